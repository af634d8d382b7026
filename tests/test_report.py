"""The tables: means and deviations by hand, and a README that shows what results/published holds."""

import pytest
import torch

import leaderboard
import report
from config import EraseConfig, TrainConfig, UserError, as_dict


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


def test_a_reference_network_is_in_the_command():
    runs = [record(s, 2.0, reference="a.tar") for s in (1, 2, 3)] + [record(1, 2.0, reference="b.tar"), record(2, 2.0)]
    for r in runs[:4]:
        r["metrics"]["clean network"] = {**r["metrics"]["NAD"], "asr": 1.0}
    assert [len(found) for found in report.groups(runs)] == [3, 1, 1]
    text = report.table(report.groups(runs)[0])
    assert "| clean network | 80.00 | 81.00 | 1.00 | - |" in text
    assert "`python main.py --reference a.tar --seed N`" in text


def test_networks_of_the_benchmark_stand_among_the_attacks():
    def trained(trigger, acc, **more):
        metrics = {"clean_acc": acc, "asr": 99.0, "parts": {}}
        return {"config": as_dict(TrainConfig(trigger_type=trigger, epochs=10)), "metrics": metrics, "machine": "cpu",
                "data": "image files (jpg)", "versions": {"torch": "2"}, "inputs": {}, "train_seconds": 60, **more}

    lines = [trained("none", 85.0), record(1, 2.0),
             trained("blendTrigger", 84.0, cell={"attack": "Blend", "defense": ""})]
    lines += [trained("none", 85.0), trained("blendTrigger", 40.0)]
    lines[-1]["config"]["train_size"] = 2000
    text = report.render_attacks(lines)
    assert "| none | 10 | 1 | 85.00 |" in text, "one seed"
    assert "40.00" not in text, "of another recipe, without a clean network to compare with"
    assert "| Blend | 10 | 1 | 84.00 | 1.00 | 99.00 |" in text
    assert report.render_attacks([]) == "no attack was measured yet"
    assert "--trigger_type blendTrigger" in report.render_attack_runs(lines)
    for file, sections in report.FILES.items():
        for name, (_, *files) in sections.items():
            assert files[-1] == "benchmark.jsonl" or "attack" not in name, file


@pytest.mark.parametrize("file", report.FILES, ids=lambda path: path.parent.name)
def test_readme_shows_what_is_published(file):
    readme = file.read_text()
    assert leaderboard.rewritten(readme, report.rendered(file)) == readme
    with pytest.raises(UserError, match="no <!-- results --> markers"):
        leaderboard.rewritten("", {"results": ""})


def test_a_folder_that_is_not_there_empties_no_readme(tmp_path):
    with pytest.raises(UserError, match="no such folder: .*nowhere"):
        report.main([str(tmp_path / "nowhere"), "--write"])


def test_only_what_is_published_goes_into_the_readmes(tmp_path, capsys):
    (tmp_path / "main.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(UserError, match="copy result files there first"):
        report.main([str(tmp_path), "--write"])
    report.main([str(tmp_path)])
    assert f"{tmp_path / 'main.jsonl'}:1 is no result line" in capsys.readouterr().err


def test_what_detect_found_by_hand():
    def line(seed, erased="", trigger="gridTrigger", sizes=(1.0, 1.0, 1.0, 1.0, 1.0, 0.1), suspects=(5,), strip=None):
        attack = {"trigger_type": trigger, "target_label": 5}
        found = {"suspects": list(suspects), "of_the_median": list(sizes), "anomaly_indices": [10 * s for s in sizes]}
        return {"config": {"seed": seed}, "attack": attack, "erased": erased, "neural_cleanse": found,
                **({"strip": strip} if strip else {}), "machine": "cpu", "versions": {"torch": "2"}}

    strip = {"threshold": 1.0, "frr": 2.0, "far": 50.0, "far_at_frr": 60.0, "auroc": 0.9}
    again = {**line(1, strip=strip)}
    del again["neural_cleanse"]
    rows = report.render_detect([
        line(2, "nad", sizes=(1.0, 0.7, 1.0, 1.0, 1.0, 0.9), suspects=(1,)), line(3, trigger="none", suspects=()),
        line(1), again, line(2, sizes=(0.2, 1.0, 1.0, 1.0, 1.0, 0.3), suspects=(0, 5)),
        line(3, trigger="none", suspects=(5,), strip={"frr": 1.0})]).splitlines()
    assert [row.split(" | ") for row in rows[2:5]] == [
        ["| BadNets", "1, 2", "20 ± 14", "2.0 ± 1.4", "2 of 2", "1", "0", "0.900", "50.0 / 2.0", "60.0 |"],
        ["| BadNets, after NAD", "2", "90", "9.0", "0 of 1", "0", "1", "", "", " |"],
        ["| clean network", "3", "", "", "", "1", "0", "", "", " |"]]
    assert report.render_detect([]) == "nothing was measured yet"


def test_the_search_names_the_default_and_the_best_within_the_bound():
    def line(asr, acc, defense="finetune", **recipe):
        return {"surrogate": "strong", "hash": "a", "recipe": recipe, "before": {"acc": 80.0},
                "metrics": {"acc": acc, "asr": [asr]},
                "config": as_dict(EraseConfig(seed=1000, defense=defense, beside=False, **recipe))}

    lines = [line(1.0, 70.0, ft_lr=0.4), line(30.0, 79.5), line(20.0, 79.0, ft_lr=0.05), line(2.0, 78.0, ft_lr=0.1),
             line(9.0, 78.4, ft_lr=0.2), line(60.0, 79.9, ft_lr=0.001)]
    rows = [row.split("|") for row in report.render_search(lines).splitlines()[2:-2]]
    assert [(row[4].strip(), row[5].strip(), row[7].strip()) for row in rows] == [
        ("2.00", "2.00", ""), ("1.60", "9.00", ""), ("10.00", "1.00", ""),
        ("1.00", "20.00", "lowest ASR within the bound"), ("0.50", "30.00", "default")]
    again = {**line(7.0, 79.9, ft_lr=0.3), "hash": "b"}
    (row,) = [x for x in report.render_search([*lines, again]).splitlines() if x.startswith("| strong, trained again ")]
    assert "| 7.10 | 0.10 | 7.00 | ft_lr 0.3 | lowest ASR within the bound |" in row, "within its own network"
    third = {**line(8.0, 79.9, ft_lr=0.3), "hash": "c"}
    rows = report.render_search([*lines, again, third]).splitlines()
    assert [x.split(" | ")[:3] for x in rows if "again" in x and x.startswith("|")] == [
        ["| strong, trained again", "finetune", "7.10"], ["| strong, trained again (2)", "finetune", "8.10"]]


def test_the_student_beside_its_teacher_and_fine_tuning():
    def line(seed, attack, defense, acc=80.0, **asr):
        r = record(seed, 0.0, defense=defense)
        metrics = {name: {**r["metrics"]["NAD"], "clean_acc": acc, "asr": value} for name, value in asr.items()}
        return {**r, "cell": {"attack": attack, "defense": defense}, "inputs": {"s_model": attack},
                "metrics": {"backdoored": r["metrics"]["backdoored"], **metrics}}

    lines = [line(1, "BadNets", "nad", teacher=1.0, NAD=2.0), line(2, "BadNets", "nad", teacher=5.0, NAD=3.0),
             line(1, "SIG", "nad", 70.0, teacher=9.0, NAD=8.0), line(3, "SIG", "nad", teacher=9.0, NAD=50.0),
             line(1, "BadNets", "finetune", **{"fine-tuning": 30.0}),
             line(1, "SIG", "finetune", **{"fine-tuning": 4.0}),
             line(2, "BadNets", "finetune", 90.0, **{"fine-tuning": 10.0})]
    assert report.render_teacher(lines).splitlines()[2:] == [
        "| BadNets | 2 | 85.0 | 80.0 | 80.0 | 20.0 | 3.0 | 2.5 |",
        "| SIG | 1 | 80.0 | 70.0 | 70.0 | 4.0 | 9.0 | 8.0 |",  # seed 3 has no fine-tuning beside it
        "| mean of 2 attacks | 3 | 82.5 | 75.0 | 75.0 | 12.0 | 6.0 | 5.2 |", "",
        "The student's ASR is 1.3 points from its teacher's in the mean of the 3 runs, 13.0 from fine-tuning's. In 1 "
        "of them these two are more than 5 points apart; in 1 of those the student is nearer to its teacher."]
    lines += [line(3, "BadNets", "nad", teacher=6.0, NAD=9.0), line(3, "BadNets", "finetune", **{"fine-tuning": 12.0})]
    assert report.render_teacher(lines).splitlines()[-1] == (
        "The student's ASR is 1.8 points from its teacher's in the mean of the 4 runs, 10.5 from fine-tuning's. In 2 "
        "of them these two are more than 5 points apart; in 1 of those the student is nearer to its teacher. Rank "
        "correlation (Spearman) over the runs of an attack, mean over 1 attacks: 1.00 with the teacher, -0.50 with "
        "fine-tuning.")
    six = [line(1, attack, d, **asr) for attack in (*leaderboard.SIX, "WaNet") for d, asr in
           (("nad", {"teacher": 1.0, "NAD": 2.0}), ("finetune", {"fine-tuning": 3.0}))]
    assert "| mean of the paper's six | 6 | 80.0 |" in report.render_teacher(six)
    assert report.render_teacher(lines[:1]) == report.render_teacher([]) == "nothing was measured yet"
    assert report.ranks(torch.tensor([3.0, 1.0, 3.0])).tolist() == [2.0, 0.5, 2.0]
