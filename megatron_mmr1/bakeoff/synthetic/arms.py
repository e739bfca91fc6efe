"""What is compared: presets of hydra_conf/sampler/ and variants of them, by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from omegaconf import OmegaConf

from megatron_mmr1.cli import CONF_DIR
from megatron_mmr1.config.schema import SamplerConfig
from megatron_mmr1.sampling.posterior import PassRates


@dataclass(frozen=True, slots=True)
class Arm:
    """One sampler.

    Attributes:
        name: for tables.
        config: None is the oracle.
        is_flat: a control: every prompt has the prior Beta(1, 1), and nothing is shared.
        is_told: strata are levels of difficulty, which a data set seldom has.
    """

    name: str
    config: SamplerConfig | None
    is_flat: bool = False
    is_told: bool = False


class FlatPrior(PassRates):
    """Posteriors without a shared prior, as a control; nothing outside the bake-off uses it."""

    def priors(self) -> tuple[np.ndarray, np.ndarray]:
        """Return Beta(1, 1) for every stratum."""
        ones_C = np.ones(self.moments_3C.shape[1])
        return ones_C, ones_C


@cache
def preset(name: str) -> SamplerConfig:
    """Read hydra_conf/sampler/NAME.yaml."""
    values = OmegaConf.load(CONF_DIR / "sampler" / f"{name}.yaml")
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SamplerConfig), values))
    assert isinstance(config, SamplerConfig)
    return config


def arms() -> list[Arm]:
    """Return all of them; "oracle" first, "uniform" second.

    Variants of a posterior differ from the preset in what their name says, and in nothing else.
    """
    posterior = preset("posterior")
    found = [Arm("oracle", None)]
    found += [
        Arm(name, preset(name))
        for name in ("uniform", "paper_section_6_1", "paper_table_6", "released_code")
    ]
    found.append(Arm("posterior (preset)", posterior))
    for score, is_thompson in (
        ("mixed", False),
        ("vps", False),
        ("variance", False),
        ("calibrated", False),
        ("variance", True),
        ("mixed", True),
    ):
        name = f"posterior {score}" + (" Thompson" if is_thompson else "")
        for ratio in (0.5, 1.0):
            config = replace(posterior, score=score, thompson=is_thompson, mixture_ratio=ratio)
            if config != posterior:
                found.append(Arm(f"{name}, lambda {ratio:g}", config))
    found += [
        Arm("prior global", replace(posterior, prior="global")),
        Arm("prior Beta(1, 1)", replace(posterior, prior="global"), is_flat=True),
        Arm("prior category (told)", replace(posterior, prior="category"), is_told=True),
    ]
    max_refills = preset("dapo").max_refills
    found.append(Arm("dapo", preset("dapo")))
    found += [
        Arm(
            f"posterior + dapo, lambda {ratio:g}",
            replace(posterior, mixture_ratio=ratio, max_refills=max_refills),
        )
        for ratio in (0.5, 1.0)
    ]
    return found
