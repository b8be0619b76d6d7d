"""What a report's terms mean, in plain words, for every page that shows them."""

from __future__ import annotations

FOUR_FIGURES: dict[str, tuple[str, str, str, str]] = {
    "forget_accuracy": (
        "FA",
        "forget accuracy",
        "share of the labels (or tokens) of the rows to forget that the model predicts correctly",
        "near the retrained model, not the lowest: a model that never saw the rows still gets many of them right",
    ),
    "retain_accuracy": (
        "RA",
        "retain accuracy",
        "the same share for the training rows that stay",
        "near the retrained model: a fall is damage",
    ),
    "test_accuracy": (
        "TA",
        "test accuracy",
        "the same share for rows that the model was never trained on",
        "near the retrained model: a fall is damage",
    ),
    "mia_auc": (
        "MIA",
        "membership inference attack",
        "how often an attacker who sees losses finds a row to forget more like a training row than an unseen row is; "
        "50 % is chance",
        "near the retrained model, not the lowest (about 50 % where the rows to forget are like any others): far below "
        "it they stand out again",
    ),
}
"""Abbreviation, name, meaning and good place of the four figures that the mean gap averages, by their key."""

COUNTS: dict[str, str] = {
    "forget_rows": "rows to forget",
    "forget_targets": "targets of the rows to forget",
    "retain_rows_measured": "retained rows measured",
    "train_rows": "training rows",
}
"""Counts whose names do not speak for themselves."""

VERDICTS: dict[str | None, str] = {
    "ok": "What was measured is as it should be.",
    "check": "Weigh the reasons that the report gives before you rely on it.",
    "retrain": "Do not rely on this step: train again without the rows.",
    None: "This method does not assess its own result. Compare the figures below.",
}
"""What each verdict asks of the reader."""

METHODS: dict[str, str] = {
    "iau": "one step along the gradient of the rows, shaped by the remembered curvature of the training",
    "iau-paper": "one step by the formula of the paper on influence approximation unlearning",
    "iau-released": "one step as the code published with the paper on influence approximation unlearning takes it",
    "bad-teacher": "training towards a random model on the rows to forget, and towards the old model on the others",
    "fine-tune": "further training on the rows that stay",
    "fisher-forgetting": "noise on the weights that matter least to the rows that stay",
    "gradient-ascent": "training in the opposite direction on the rows to forget",
    "influence-cg": "one influence-function step, solved by conjugate gradients",
    "l1-sparse": "further training on the rows that stay, with a penalty that makes weights sparse",
    "neggrad-plus": "training on the rows that stay and in the opposite direction on the rows to forget",
    "npo": "training that makes the rows to forget less likely than they were (negative preference optimization)",
    "random-labels": "training on the rows to forget with random labels, then on the rows that stay",
    "retrain": "training again from the start without the rows",
    "salun": "training with random labels of those weights alone that matter to the rows to forget",
    "scrub": "training away from the old model on the rows to forget, and towards it on the others",
    "ssd": "shrinking the weights that matter far more to the rows to forget than to all rows",
    "unrolling-sgd": "taking back what the rows contributed to the training, to first order",
}
"""What each method does, as the end of the sentence "The weights were changed by …"."""

MULTI_STEP = "many short steps along the gradient of the rows, shaped by the remembered curvature of the training"

SOURCES: dict[str, str] = {
    "forget rows": "the rows to forget themselves, compared with held-out rows",
    "proxies": "random training rows that stood in for the rows to forget, compared with held-out rows",
    "class share": "how often held-out rows were predicted as the class that was removed",
    "remembered": "an earlier request's calibration, remembered",
    "given": "nothing: its size was given by the caller",
    "uncalibrated": "nothing, for want of held-out rows",
    "multi-step": "held-out rows, watched at each step",
}
"""What the size of the step rests on, after `hf_iau.methods.iau.step_search.Calibration.source`."""

GUARANTEED: tuple[str, ...] = (
    "The weights were changed as described, with the settings given here.",
    "The figures were measured on the model before and after, on the same rows, with the versions named below.",
)

NOT_GUARANTEED: tuple[str, ...] = (
    "This is approximate unlearning. Nothing here is a proof that the rows left no trace; attacks that were not run "
    "may find more.",
    "Figures are means over rows. Single rows may be remembered, or over-forgotten, while the means agree.",
    "Near-duplicates of the forgotten rows among the retained ones still teach the model what they hold; a retrained "
    "model would know them too.",
    "Older checkpoints, optimizer states, logs, gradient memories and earlier revisions of a published repository "
    "still carry the forgotten rows. The difference between the weights before and after carries them as well: do not "
    "publish both.",
)
UNCALIBRATED = "The step was not calibrated: it may have forgotten too little or too much."


def not_guaranteed(calibrated: bool | None) -> list[str]:
    """The limits of one request, in sentences."""
    return [*NOT_GUARANTEED, *([UNCALIBRATED] if calibrated is False else [])]
