"""`IAUConfig` refuses what cannot be meant."""

from __future__ import annotations

import pytest

from hf_iau import ConfigError, IAUConfig


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"length": -1.0}, "length=-1.0"),
        ({"damping": float("nan")}, "damping=nan"),
        ({"finish_weight": -0.1}, "finish_weight"),
        ({"finish_damping": -1.0}, "finish_damping=-1.0"),
        ({"finish_damping": float("inf")}, "finish_damping=inf"),
        ({"max_relative_step": 0.0}, "max_relative_step"),
        ({"calibrate_on": "hope"}, "calibrate_on='hope'"),
        ({"damping_range": (1.0, 0.1)}, "damping_range"),
        ({"proxy_rows": (5,)}, "proxy_rows"),
        ({"held_out_rows": 10}, "held_out_rows=10"),
    ],
)
def test_bad_configuration(values, words):
    with pytest.raises(ConfigError, match=words):
        IAUConfig(**values)
