"""The tables: means and deviations by hand, and a README that shows what results/published holds."""

import pytest
from conftest import ROOT

import leaderboard
import report
from config import EraseConfig, UserError, as_dict


def record(seed, asr, **changes):
    config = as_dict(EraseConfig(seed=seed, s_model="weight/s_net/WRN-16-1-S-model_best.pth.tar", **changes))
    metrics = {"clean_acc": 80.0, "clean_acc_non_target": 81.0, "asr": asr, "ra": None}
    attack = {"trigger_type": "gridTrigger", "target_type": "all2one"}
    return {"config": config, "attack": attack, "inputs": {"s_model": "a", "t_model": ""}, "data": "image files (jpg)",
            "metrics": {"backdoored": {**metrics, "asr": 100.0}, "NAD": metrics}, "train_seconds": 90,
            "machine": "cpu", "versions": {"torch": "2"}}


def test_mean_and_deviation_over_seeds():
    runs = [record(1, 2.0), record(2, 3.0), record(3, 4.0), record(3, 7.0), record(1, 9.0, lr=0.5)]
    assert report.render_headline(runs) == (
        "**WRN-16-1, CIFAR-10 (image files (jpg)), gridTrigger, all2one, 5% clean images; seeds 1, 2, 3.**\n\n"
        "| | ACC | ACC (non-target) | ASR | RA |\n|---|---|---|---|---|\n"
        "| backdoored | 80.00 | 81.00 | 100.00 | - |\n"
        "| NAD | 80.00 | 81.00 | 4.00 ± 2.65 | - |\n\n"
        "`python main.py --seed N`, cpu, torch 2, 1.5 minutes of training a run.")


def test_readme_shows_what_is_published():
    readme = (ROOT / "README.md").read_text()
    assert leaderboard.rewritten(readme, report.rendered()) == readme
    with pytest.raises(UserError, match="no <!-- results --> markers"):
        leaderboard.rewritten("", {"results": ""})
