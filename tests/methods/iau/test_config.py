"""`IAUConfig` refuses what cannot be meant."""

from __future__ import annotations

import pytest

from hf_iau import ConfigError, IAUConfig


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"scale": -1.0}, "scale=-1.0"),
        ({"damping": float("nan")}, "damping=nan"),
        ({"retain_weight": -0.1}, "retain_weight"),
        ({"retain_damping": -1.0}, "retain_damping=-1.0"),
        ({"retain_damping": float("inf")}, "retain_damping=inf"),
        ({"max_relative_step": 0.0}, "max_relative_step"),
        ({"calibrate_on": "hope"}, "calibrate_on='hope'"),
        ({"damping_range": (1.0, 0.1)}, "damping_range"),
        ({"damping_range": (0.1, float("inf"))}, "damping_range"),
        ({"damping_range": (0.1,)}, "damping_range"),
        ({"retain_weights": (0.01, -0.01)}, "retain_weights"),
        ({"retain_weights": (float("nan"),)}, "retain_weights"),
        ({"proxy_rows": (5,)}, "proxy_rows"),
        ({"scale": "1"}, "scale='1'"),
        ({"renew_curvature": -0.1}, "renew_curvature=-0.1"),
        ({"max_relative_step": 11.0}, "max_relative_step=11.0.*<= 10"),
        ({"held_out_rows": 150.5}, "held_out_rows=150.5.*whole"),
        ({"held_out_rows": 10}, "held_out_rows=10"),
    ],
)
def test_bad_configuration(values, words):
    with pytest.raises(ConfigError, match=words):
        IAUConfig(**values)
