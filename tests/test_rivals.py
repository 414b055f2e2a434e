"""What `4_rivals.ipynb` computes, executed as it stands on made-up results."""

import json
import shutil

import IPython.display
import matplotlib as mpl
import nbformat
import pytest
import torch

from eatlib.config import RunConfig
from eatlib.energy import energy_report
from eatlib.results import ROOT

mpl.use("agg")
CELLS = [
    cell
    for cell in nbformat.read(ROOT / "notebooks" / "4_rivals.ipynb", as_version=4).cells
    if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", [])
]
BOTH = "l0, σ 0.0001 + thresholds"


def executed(tmp_path, monkeypatch, results, derived, names):
    """The notebook's variables, and all that it `said`, on these results in a folder with a study."""
    folder = tmp_path / "made-up"
    for result in results:
        result.save(folder / f"{names[result.config_hash]}.json")
    (folder / "derived.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in derived))
    said = []
    monkeypatch.setattr(IPython.display, "display", lambda shown, **_: said.append(getattr(shown, "data", "")))
    variables = {"study": folder.name, "results": str(tmp_path)}
    for cell in CELLS:
        if "plt.show" not in cell.source and "FloatLogSlider(" not in cell.source:
            exec(cell.source, variables)
    return variables | {"said": "\n".join(text for text in said if isinstance(text, str))}


@pytest.fixture
def made_up(tmp_path, make_result, make_study):
    """Results of two seeds, what was derived from them, and their names in a study."""
    results, derived = [], []
    for seed in (0, 1):
        first = make_result(accuracy=0.87, ratio=0.85, width=0.125, seed=seed, epochs=2)
        values = [
            {"accuracy": 0.9, "ratio": 0.8, "epochs": 3, "start": first.config_hash},
            {"accuracy": 0.9, "ratio": 0.6, "lambda": 1, "fused": 0.7, "start": first.config_hash},
            {"accuracy": 0.88, "ratio": 0.7, "lambda": 1, "penalty": "l1", "start": first.config_hash},
            {"accuracy": 0.89, "ratio": 0.45, "width": 0.0625, "epochs": 5},
        ]
        results += [first, *(make_result(**{"width": 0.125, "seed": seed} | value) for value in values)]
        values = {"accuracy": 0.85, "ratio": 0.4, "lambda": 2, "fused": 0.6, "start": results[-3].config_hash}
        results.append(make_result(width=0.125, seed=seed, **values))
    names = make_study(tmp_path / "made-up", [result.config for result in results])
    for result in results:
        config = result.config
        after = {0: {"accuracy": 0.895, "ratio": 0.5}, 1: {"accuracy": 0.89, "ratio": 0.3}}
        if config.start and config.penalty == "l0":
            after = make_result(**after.get(config.lambda_, {"accuracy": 0.84, "ratio": 0.2})).test
            parts = {"accuracy": after.accuracy, "energy": after.model_dump(mode="json")["energy"]}
            for energy in parts["energy"].values():
                energy["weights"] = 100
            for treatment in ({"thresholds": 0.01}, {"int8": True}):
                record = {"run": names[result.config_hash], "hash": result.config_hash, "treatment": treatment}
                record |= {"validation": parts, "test": parts, "provenance": {"wall_seconds": 1}}
                derived.append(record)
    return results, derived, names


@pytest.fixture
def notebook(tmp_path, monkeypatch, made_up):
    return executed(tmp_path, monkeypatch, *made_up)


def test_hypervolumes_by_hand(notebook):
    """Down to three points below .9, of ratios up to .8; between points, lines."""
    volumes = notebook["volumes"].groupby(["measure", "way"])["hypervolume"].mean()
    area = 0.03 * 0.8
    by_hand = {
        "l0, σ 0.0001": 0.2 * 0.03 + 0.2 * (3 / 5) * 0.03 / 2,  # from .6 down to .4, accuracy falls from .9 to .85
        "l1": 0.1 * (0.01 + 0.03) / 2,
        "smaller networks": 0.35 * (0.02 + 0.03) / 2,
        "thresholds": 0.3 * (0.025 + 0.03) / 2,
        # .5, ST with thresholds, .3 and .2: .895, .89 and .84
        BOTH: 0.3 * (0.025 + 0.03) / 2 + 0.2 * (0.02 + 0.025) / 2 + 0.1 * (2 / 5) * 0.02 / 2,
    }
    for name, volume in by_hand.items():
        assert volumes["ratio, published", name] == pytest.approx(100 * volume / area, rel=2e-3), name
    # made up with equal counts, so that joules are as the ratio; `fused` has other values of the penalty alone
    assert volumes["joules, published", "l1"] == pytest.approx(100 * by_hand["l1"] / area, rel=2e-3)
    fused = 0.1 * 0.03 + 0.1 * (3 / 5) * 0.03 / 2
    assert volumes["joules, fused", "l0, σ 0.0001"] == pytest.approx(100 * fused / area, rel=2e-3)
    most = notebook["volumes"].groupby(["measure", "way"])["at_most"].mean()["ratio, published"]
    assert most["l0, σ 0.0001"] == volumes["ratio, published", "l0, σ 0.0001"], "it ends below the margin"
    assert most["l1"] == pytest.approx(100 * (by_hand["l1"] + 0.7 * 0.01) / area, rel=2e-3)  # .88 all the way


def test_steps_count_single_networks_alone(notebook):
    """From each point up to the energy of the next its own accuracy, not a line to that of the next."""
    steps = notebook["hypervolumes"](*map(notebook.get, ("everything", "standard", "ENERGIES")), lines=False)
    steps = steps.groupby(["measure", "way"])["hypervolume"].mean()["ratio, published"]
    by_hand = {"l0, σ 0.0001": 0.2 * 0.03, "thresholds": 0.3 * 0.025, BOTH: 0.2 * 0.02 + 0.3 * 0.025}
    for name, volume in by_hand.items():
        assert steps[name] == pytest.approx(100 * volume / (0.03 * 0.8), rel=2e-3), name
    assert "*l0, σ 0.0001* 25.0%" in notebook["said"]
    assert "no network within the margin" not in notebook["said"]


@pytest.mark.parametrize("seeds", [{0}, {0, 1}])
def test_a_way_without_a_network_within_the_margin_says_so(tmp_path, monkeypatch, made_up, make_result, seeds):
    """In one seed standard training is taken in its place; in all, there is none."""
    results, derived, names = made_up
    for i, result in enumerate(results):
        if result.config.penalty == "l1" and result.config.seed in seeds:
            results[i] = make_result(accuracy=0.86, ratio=0.7, **result.config.to_dict())
    notebook = executed(tmp_path, monkeypatch, results, derived, names)
    table = (tmp_path / "made-up" / "rivals.md").read_text()
    (row,) = [line for line in table.splitlines() if "| l1 |" in line]
    said = "*l1* has no network within the margin on digits, ResNet-18."
    if len(seeds) == 1:  # .7 of .8, the last point of its way
        assert row.endswith("| ≥ 6% ± 9% (1.0; ST in 1 of 2 seeds) | ≥ 0% ± 0% |")
    else:
        assert row.endswith("| none | none |")
    assert (said in notebook["said"]) == (len(seeds) == 2)


def test_paths_are_measured_from_the_standard_training_of_their_seed_smaller_networks_from_the_mean(notebook):
    everything, standard = notebook["everything"].copy(), notebook["standard"].copy()
    for table in everything, standard:
        table.loc[table["seed"] == 1, ["validation_accuracy", "test_accuracy"]] += 0.01
    volumes = notebook["hypervolumes"](everything, standard, notebook["ENERGIES"]).set_index(["measure", "way", "seed"])
    own = volumes.sort_index().loc["ratio, published", "hypervolume"]
    assert own["l1", 0] == pytest.approx(own["l1", 1])
    apart = 100 * (0.35 * 0.01) / (0.03 * 0.8)  # of its line, from .45 to .8, by .01
    assert own["smaller networks", 1] - own["smaller networks", 0] == pytest.approx(apart, rel=2e-3)
    bounds = notebook["summary"].set_index("way")["lower_bound"]
    assert bounds[["l1", "smaller networks"]].all(), "they end above the margin"
    assert not bounds["l0, σ 0.0001"]


def test_points_are_chosen_on_validation_images(tmp_path, monkeypatch, made_up, make_result):
    """What is cheap and, on test images alone, accurate is neither taken nor part of the area."""
    results, derived, names = made_up
    lucky = [result for result in results if result.config.lambda_ == 2]
    for result in lucky:
        values = {"accuracy": 0.95, "ratio": 0.3, "validation": (0.5, 0.3)}
        results[results.index(result)] = make_result(**values, **result.config.to_dict())
    notebook = executed(tmp_path, monkeypatch, results, derived, names)
    taken = notebook["taken"].set_index(["way", "seed"])
    assert set(taken.loc["l0, σ 0.0001", "lambda"]) == {1}
    assert taken.loc[("l0, σ 0.0001", 0), "saved"] == pytest.approx(100 * (1 - 0.7 / 0.8))
    # a batch of 10 reads all weights once; alone, each image does
    weights = 0.9 * 1950 * notebook["read_weights"]("resnet18", 2, 16, 0.125)
    alone = 100 * (1 - (0.7 * (1950 + 3.7) * 100 + weights) / (0.8 * (1950 + 3.7) * 100 + weights))
    assert taken.loc[("l0, σ 0.0001", 0), "saved_alone"] == pytest.approx(alone)
    summary = notebook["summary"].set_index("way")
    assert summary.loc["l0, σ 0.0001", ["seeds", "lost", "total_epochs"]].tolist() == [2, pytest.approx(0), 4]


def test_the_winner_is_named_by_accounting(notebook):
    names = [
        text.partition("**: ")[2].partition(" by ")[0] for text in notebook["said"].split("- ") if "**ratio, p" in text
    ]
    # Thresholds and l1 end above the margin: at .895 and .88 down to no energy, they would not be behind.
    assert names[0].startswith(f"first, but not clearly before the next, is **{BOTH}** with 54.8%, before *thresholds*")
    assert f"**joules, published**: first, but not clearly before the next, is **{BOTH}**" in notebook["said"]
    apart = "has 32.5%. Clearly apart from it in half of the cases or more (cases better : worse): "
    better = f"*{BOTH}* 1 : 0, *smaller networks* 1 : 0, *thresholds* 1 : 0"
    assert (
        f"The paper's penalty on a path (*l0, σ 0.0001*) {apart}{better}.\n" in notebook["said"]
    )  # equal seeds: all are apart
    variables = notebook["verdict"].__globals__
    variables["volumes"] = notebook["volumes"].assign(at_most=notebook["volumes"]["hypervolume"])
    said = notebook["verdict"]("joules, published")
    assert f"the winner is **{BOTH}** with 54.8%, before *smaller networks*" in said
    assert said.endswith(", *l1* 0 : 1.")


def test_smaller_networks_are_compared_with_standard_training_in_one_piece_too(notebook, made_up):
    """As wide as all others and trained as the smaller ones, .92 at .8: the smaller one's .89 is on the margin."""
    variables = notebook["way"].__globals__
    everything, configs = notebook["everything"], [result.config for result in made_up[0]]
    assert notebook["way"](configs[0]) == "where all start"
    assert notebook["way"](RunConfig.parse(configs[0].to_dict() | {"epochs": 5})) == "smaller networks"
    assert notebook["way"](configs[2]) == "l0, σ 0.0001"
    assert notebook["way"](RunConfig.parse(configs[2].to_dict() | {"epochs": 3})) == "l0, σ 0.0001, no path"  # as ST
    assert "one cycle" not in notebook["said"]
    assert "*smaller networks* ≥ 75%; *l0, σ 0.0001* 0%." in notebook["said"]  # it has a quarter of the weights
    wide = everything[(everything["way"] == "smaller networks") & (everything["width"] < 0.125)]
    energies = wide[[*notebook["ENERGIES"].values()]] * (0.8 / 0.45)
    wide = wide.assign(run="wide", width=0.125, test_accuracy=0.92, validation_accuracy=0.92, **energies)
    variables["everything"] = notebook["pd"].concat([everything, wide])
    # The smaller one's line reaches the margin at .45; with thresholds, ST's .9 is one point above it, .895 at .5 half
    # a point, and .3 on it.
    areas = 0.35 * 0.03 / 2, 0.3 * (0.01 + 0.005) / 2 + 0.2 * 0.005 / 2
    smaller, both = (100 * area / (0.03 * 0.8) for area in areas)
    said = notebook["of_smaller_networks"]()[0]
    assert "With one cycle ST has +2.0 points of accuracy" in said
    assert said.endswith(" gave it +3.0 points.")  # .87 → .9
    assert f"*smaller networks* {smaller:.1f}% and {smaller:.1f}%; " in said
    assert "+ thresholds" not in said
    curves, widest = notebook["in_one_piece"]()
    sizes = notebook["hypervolumes"](curves, widest, notebook["ENERGIES"], paired=False).set_index(["way", "measure"])
    assert sizes.loc[(BOTH, "ratio, published"), "hypervolume"].mean() == pytest.approx(both, rel=2e-3)


def test_a_smaller_network_may_have_a_path_of_its_own(tmp_path, monkeypatch, made_up, make_result, make_study):
    """From its own standard training; then it is a way, and what EAT saves there is beside what it saves alone."""
    results, derived, _ = made_up
    for seed in (0, 1):
        common = {"width": 0.0625, "seed": seed}
        first = make_result(accuracy=0.8, ratio=0.9, epochs=2, **common)
        values = [{"accuracy": 0.885, "ratio": 0.4, "epochs": 3}, {"accuracy": 0.88, "ratio": 0.25, "lambda": 1}]
        results += [first, *(make_result(start=first.config_hash, **common, **value) for value in values)]
    shutil.rmtree(tmp_path / "made-up")
    names = make_study(tmp_path / "made-up", [result.config for result in results])
    derived = [record | {"run": names[record["hash"]]} for record in derived]
    notebook = executed(tmp_path, monkeypatch, results, derived, names)
    both = "l0, σ 0.0001, 50% as wide"
    own = notebook["everything"][notebook["everything"]["way"] == both]
    assert own["test_published_ratio"].tolist() == pytest.approx(2 * [0.8] + 2 * [0.4, 0.25])
    assert f"before *{both}* by" in notebook["verdict"]("joules, published")
    assert both not in notebook["verdict"]("ratio, published"), "a ratio cannot see what it saves"
    saved = notebook["together"].set_index("treatment")["saved"]
    assert saved[["as it is", "50% as wide"]].tolist() == pytest.approx([12.5, 100 * (1 - 0.25 / 0.4)])
    assert {row["lambda"] for row in notebook["victims"]} == {0, 1}
    assert len(notebook["victims"]) == 2, "whose weights the study keeps"


def test_who_is_not_clearly_ahead_is_no_winner(notebook):
    volumes = notebook["volumes"]
    own = volumes[(volumes["measure"] == "joules, fused") & (volumes["seed"] == 0)]
    noisy = [own.assign(seed=seed, hypervolume=own["hypervolume"] + off) for seed, off in ((0, 0), (1, 9), (2, -9))]
    mixed = notebook["pd"].concat(noisy)
    mixed.loc[(mixed["way"] == "thresholds"), "hypervolume"] = 50.0

    def lead(volumes, first, second):
        return notebook["lead"](volumes.assign(at_most=volumes["hypervolume"]), first, second)

    said, clear, _ = lead(mixed, BOTH, "thresholds")
    assert "in 0 of 1 cases" in said
    assert not clear
    # Smaller networks share no start with the others: two spreads of 9 are one of 12.7, though all seeds are 20 apart.
    mixed["hypervolume"] = [
        9 * (row.seed == 1) - 9 * (row.seed == 2) + 20 * (row.way == "smaller networks") for row in mixed.itertuples()
    ]
    assert not lead(mixed, "smaller networks", "l1")[1]
    mixed.loc[mixed["way"] == "smaller networks", "hypervolume"] += 10
    assert lead(mixed, "smaller networks", "l1")[1]
    mixed.loc[mixed["way"] == "thresholds", "hypervolume"] = (
        mixed.loc[mixed["way"] == "l1", "hypervolume"].to_numpy() + 1
    )
    assert lead(mixed, "thresholds", "l1")[1], "these do"
    one = mixed[mixed["seed"] == 0]
    said = "1.0 points of hypervolume (one seed, so without a spread)"
    assert lead(one, "thresholds", "l1") == (said, 0, 0)


def test_networks_that_lack_most_ways_are_not_compared_nor_ways_or_seeds_that_not_all_have(notebook):
    concat, ranking = notebook["pd"].concat, notebook["ranking"]
    volumes = notebook["volumes"][notebook["volumes"]["measure"] == "joules, fused"]
    undone = volumes[volumes["way"].isin(["l1", "thresholds"])].assign(title="not done", hypervolume=99.0)
    assert ranking(concat([volumes, undone])).to_dict() == ranking(volumes).to_dict(), "5 ways, not 2 twice"
    undone = volumes[volumes["way"] != "l1"].assign(title="not done", hypervolume=99.0)
    ranks = ranking(concat([volumes, undone]))
    assert ranks.to_dict() == pytest.approx(
        {name: (size + 99) / 2 for name, size in ranking(volumes).drop("l1").items()}
    )
    ranks = ranking(concat([volumes, volumes.assign(title="another", way=volumes["way"].replace("l1", "l2"))]))
    assert not {"l1", "l2"} & {*ranks.index}
    assert "thresholds" in ranks
    lucky = volumes[(volumes["way"] != "l1") | (volumes["seed"] == 0)].copy()
    lucky.loc[lucky["seed"] == 1, "hypervolume"] = 99.0
    assert ranking(lucky).to_dict() == ranking(volumes[volumes["seed"] == 0]).to_dict()
    apart = volumes[(volumes["way"] == "l1") == (volumes["seed"] == 0)]
    assert ranking(apart).empty, "no seed has both"


def test_of_a_part_of_a_study_only_whole_ways_are_compared(tmp_path, monkeypatch, made_up):
    results, derived, names = made_up
    results = [result for result in results if (result.config.lambda_, result.config.seed) != (2, 1)]
    notebook = executed(tmp_path, monkeypatch, results, derived, names)
    seeds = notebook["everything"].groupby("way")["seed"].agg(set).to_dict()
    assert seeds["l0, σ 0.0001"] == {0}
    assert seeds["l1"] == {0, 1}
    said = "PARTIAL: 11 of the study's 12 runs have a result"
    assert said in notebook["said"]
    names = "rivals", "together", "verdict", "winners"
    assert all(said in (tmp_path / "made-up" / f"{name}.md").read_text() for name in names)


def test_a_study_in_which_nothing_is_whole_yet_says_so(tmp_path, monkeypatch, made_up):
    results, _, names = made_up
    narrow = [result for result in results if result.config.width < 0.125]
    notebook = executed(tmp_path, monkeypatch, narrow, [], names)
    assert "no two ways are whole" in notebook["said"]
    assert "nothing is whole yet" in (tmp_path / "made-up" / "rivals.md").read_text()


def test_what_is_not_treated_yet_is_told_and_weighs_nothing(tmp_path, monkeypatch, made_up, make_result, make_study):
    """Of seed 1, whose EAT saves more than that of seed 0; a network is known by its hash, whatever it was called."""
    results, derived, _ = made_up
    index = next(
        i
        for i, result in enumerate(results)
        if result.config.seed == result.config.lambda_ == 1 and result.config.penalty == "l0"
    )
    results[index] = make_result(0.9, 0.6, fused=0.5, **results[index].config.to_dict())
    kept = {record["hash"] for record in derived}
    configs = [result.config.model_copy(update={"save_weights": result.config_hash in kept}) for result in results]
    shutil.rmtree(tmp_path / "made-up")
    names = make_study(tmp_path / "made-up", configs)
    half = [
        record | {"run": "old name"} for record in derived if record["hash"] in {r.config_hash for r in results[:6]}
    ]
    notebook = executed(tmp_path, monkeypatch, results, half, names)
    assert "PARTIAL: 3 of 6 networks have not been treated" in (tmp_path / "made-up" / "verdict.md").read_text()
    assert notebook["together"].set_index("treatment").loc["int8", "saved"] == pytest.approx(40)
    assert "as it is: EAT saves 13% of the joules" in notebook["said"], "12.5; both seeds have 25"
    executed(tmp_path, monkeypatch, results, [], names)
    verdict = (tmp_path / "made-up" / "verdict.md").read_text()
    assert "the paper's path: no network has been treated yet." in verdict
    assert "nan" not in verdict


def test_what_eat_saves_of_a_treated_network(notebook, tmp_path):
    # λ 1 is within the margin, λ 2 is not; int8: from 0.5 to 0.3
    together = notebook["together"].set_index("treatment")
    assert set(notebook["bases"]["lambda"]) == {0, 1}
    assert together.loc["int8", "saved"] == pytest.approx(40)
    assert together.loc["as it is", "saved"] == pytest.approx(100 * (1 - 0.7 / 0.8))
    at_int8 = (487.5 + 0.2) * 1e-12 * 1000 * 0.5 / 10
    assert together.loc["int8", "test_fused_joules_st"] == pytest.approx(1e6 * at_int8)
    after = "int8: EAT saves 40% of the joules of ST so treated, for 0.5 points of accuracy, clearly more than as it is"
    assert f"{after} in 1 of 1 cases (by 27.5 points)" in notebook["said"]
    saved = f"int8 saves {1 - at_int8 / (1e-6 * together.loc['as it is', 'test_fused_joules_st']):.0%} of ST's joules"
    assert f"{saved} (fused; one image at a time: " in notebook["said"]
    means = "EAT saves 13% of untreated ST's joules, and after a treatment, of what is left, 40%."
    assert f"for 0.5 points. In the mean over cases {means}" in notebook["said"]
    short = (
        "a smaller network, trained anew, has more area than *l0, σ 0.0001* in 1 of 1 cases; within the margin save,"
    )
    short += " of ST's joules, *l0, σ 0.0001* 13% for 0.0 points, *thresholds* ≥ 38% for 0.5 points; "
    short += f"{saved.partition(' of ')[0]} for 0.5, and EAT 40% of what it leaves for 0.5."
    assert short in (tmp_path / "made-up" / "winners.md").read_text()


def test_other_prices_give_the_hypervolumes_of_all_tables(notebook):
    for hardware in notebook["HARDWARE"].values():
        at = notebook["at"](hardware.memory_pj, hardware.operation_pj)
        volumes = notebook["hypervolumes"](*notebook["points"](hardware), notebook["ENERGIES"])
        for measure in notebook["AREAS"]:
            expected = notebook["ranking"](volumes[volumes["measure"] == measure])
            assert at[measure].to_dict() == pytest.approx(expected.to_dict())


def test_weights_that_one_image_reads_are_those_of_the_report(notebook):
    from eatlib.models import build_model

    for name, size in (("resnet18", 16), ("vgg16", 32)):
        network = build_model(name, classes=5, image_size=size, width=0.0625).eval()
        report = energy_report(network, [torch.rand(2, 3, size, size)], accounting="fused")
        assert notebook["read_weights"](name, 5, size, 0.0625) == report.layers["nonzero_parameters"].sum()


def test_the_attack_raises_the_energy_within_its_size(notebook):
    torch.manual_seed(0)
    from eatlib.models import build_model

    network = build_model("resnet18", classes=10, image_size=16, width=0.0625).eval()
    images = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    changed, random = (notebook["sponge"](network, images, 8 / 255, steps) for steps in (10, 0))
    assert (changed - images / 255).abs().max() <= 8 / 255 + 1e-6
    assert torch.equal((255 * changed).round() / 255, changed)  # an image of 8 bits
    assert 0 <= changed.min() <= changed.max() <= 1
    clean, chance, spent = (
        energy_report(network, [x], accounting="fused").joules_per_image for x in (images, random, changed)
    )
    assert spent - clean > 2 * abs(chance - clean)
    assert not network.training
    assert not network.relu._forward_pre_hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert len(CELLS[-1].source.splitlines()) <= 30
    (function,) = [cell.source for cell in CELLS if "def sponge" in cell.source]
    assert len(function[function.index("def sponge") :].splitlines()) <= 30
