"""What simulators get: shapes and densities against hand-made ones, problem files against the published format."""

from fractions import Fraction
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from test_energy import Functional, images, tiny
from torch import Tensor, nn
from torch.nn import functional as F

from eatlib import build_model
from eatlib.energy import EnergyError, densities, energy_report, write_problems
from eatlib.energy.densities import COEFFICIENTS, DIMENSIONS

SIZES = DIMENSIONS + COEFFICIENTS


def counts(row: pd.Series) -> dict[str, Fraction]:
    return {what: Fraction(int(row[f"nonzero_{what}"]), int(row[what])) for what in ("inputs", "weights", "outputs")}


def test_a_convolution_by_hand() -> None:
    """4 channels of 7x9 to 6, two groups, a kernel 2 high and 3 wide: 3 x 7 outputs with strides of 2 and 1."""
    convolution = nn.Conv2d(4, 6, (2, 3), stride=(2, 1), groups=2)
    nn.init.ones_(convolution.weight)
    nn.init.zeros_(convolution.bias)
    with torch.no_grad():
        convolution.weight[0, 0, 0, 0] = 0
    x = torch.zeros(5, 4, 7, 9)
    x[:, 0] = 1  # of the first group, so that its three output channels are 1, and the others' 0
    (row,) = densities(nn.Sequential(convolution), [x]).to_dict("records")
    assert {name: row[name] for name in DIMENSIONS} == {"N": 5, "G": 2, "C": 2, "M": 3, "P": 7, "Q": 3, "R": 3, "S": 2}
    assert {name: row[name] for name in COEFFICIENTS} == {"Wstride": 1, "Hstride": 2, "Wdilation": 1, "Hdilation": 1}
    assert (row["inputs"], row["nonzero_inputs"], row["inputs_density"]) == (5 * 4 * 63, 5 * 63, 1 / 4)
    assert (row["weights"], row["nonzero_weights"], row["weights_density"]) == (6 * 2 * 6, 71, 71 / 72)
    assert (row["outputs"], row["nonzero_outputs"], row["outputs_density"]) == (5 * 6 * 21, 5 * 3 * 21, 1 / 2)


def test_a_linear_layer_and_the_activation_before_it_by_hand() -> None:
    """Over batches of 2 and 1; outputs are what is written, after ReLU, and the bias is no weight."""
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]))
        net[0].bias.zero_()
        net[2].weight.copy_(torch.tensor([[1.0, 1, 0, 0]]))
        net[2].bias.fill_(1)
    table = densities(net, [torch.tensor([[1.0, 0], [0, 0]]), torch.tensor([[-1.0, 2]])])
    assert list(table["name"]) == ["0", "2"]
    assert table[["N", "C", "M"]].to_numpy().tolist() == [[2, 2, 4], [2, 4, 1]]
    assert (table[[name for name in SIZES if name not in "NCM"]] == 1).all(axis=None)
    relu = Fraction(1 + 0 + 2, 12)
    assert counts(table.iloc[0]) == {"inputs": Fraction(3, 6), "weights": Fraction(4, 8), "outputs": relu}
    assert counts(table.iloc[1]) == {"inputs": relu, "weights": Fraction(2, 4), "outputs": Fraction(3, 3)}


@pytest.mark.parametrize("model", [tiny(), Functional(), build_model("mobilenet_v2", classes=4, image_size=32)])
def test_sizes_multiply_to_the_macs_and_to_the_weights(model: nn.Module) -> None:
    batches = [images(3, 3, 32, 32)]
    table = densities(model, batches).set_index("name")
    layers = energy_report(model, batches, accounting="fused").layers.set_index("name").loc[table.index]
    assert (table[DIMENSIONS].prod(axis=1) == layers["operations"]).all()
    assert (table[["G", "C", "M", "R", "S"]].prod(axis=1) == table["weights"]).all()
    for what in ("inputs", "outputs"):
        assert table[what].equals(layers[what])
        assert table[f"nonzero_{what}"].equals(layers[f"nonzero_{what}"])


def test_a_1d_convolution_has_no_height() -> None:
    (row,) = densities(nn.Conv1d(2, 3, 4, stride=2, dilation=3), [images(5, 2, 20)]).to_dict("records")
    assert {name: row[name] for name in DIMENSIONS} == {"N": 5, "G": 1, "C": 2, "M": 3, "P": 6, "Q": 1, "R": 4, "S": 1}
    assert {name: row[name] for name in COEFFICIENTS} == {"Wstride": 2, "Hstride": 1, "Wdilation": 3, "Hdilation": 1}


class Mixed(nn.Module):
    """A convolution, its transpose, a product of two activations, and a convolution whose output nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 2, 2), nn.ConvTranspose2d(4, 3, 2, 2)
        self.unread = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(F.relu(self.down(x)))
        self.unread(x)
        return y.flatten(2) @ y.flatten(2).transpose(1, 2)


def test_what_has_no_such_shape_stays_in_the_table_and_is_not_written(tmp_path: Path) -> None:
    table = densities(Mixed(), [images(2, 3, 8, 8)])
    assert list(table["name"]) == ["down", "up", "unread", "bmm"]
    assert list(table["N"].isna()) == [False, True, False, True]
    assert list(table["inputs"]) == [2 * 3 * 64, 2 * 4 * 16, 2 * 3 * 64, 2 * 2 * 3 * 64]
    assert list(table["weights"]) == [3 * 4 * 4, 3 * 4 * 4, 3 * 2, 0]
    down, unread = write_problems(table, tmp_path)
    assert [down.name, unread.name] == ["00-down.yaml", "02-unread.yaml"]
    assert yaml.safe_load(unread.read_text())["problem"]["instance"]["densities"].keys() == {"Inputs", "Weights"}


@pytest.mark.parametrize("distribution", ["hypergeometric", "fixed_structured"])
def test_problem_files_have_the_published_keys(distribution: str, tmp_path: Path) -> None:
    """Those of NVlabs/timeloop's examples, as Accelergy-Project/timeloopfe, timeloopfe/v4/problem.py, checks them."""
    table = densities(tiny(), [images(2, 3, 16, 16)])
    paths = write_problems(table, tmp_path / "new" / "folder", distribution)
    assert [path.name for path in paths] == ["00-0.yaml", "01-4.yaml", "02-9.yaml"]
    for path, row in zip(paths, table.to_dict("records"), strict=True):
        document = yaml.safe_load(path.read_text())
        assert document.keys() == {"problem"}
        problem = document["problem"]
        assert problem.keys() == {"version", "instance", "shape"}
        assert problem["version"] == 0.4
        shape, instance = problem["shape"], dict(problem["instance"])
        assert shape.keys() == {"name", "dimensions", "coefficients", "data_spaces"}
        assert all(len(name) == 1 for name in shape["dimensions"])
        assert all(part.keys() == {"name", "default"} for part in shape["coefficients"])
        known = {*shape["dimensions"], *(part["name"] for part in shape["coefficients"])}
        given = instance.pop("densities")
        assert instance == {name: row[name] for name in SIZES}
        assert instance.keys() == known
        assert [tensor["name"] for tensor in shape["data_spaces"]] == ["Inputs", "Weights", "Outputs"]
        for tensor in shape["data_spaces"]:
            assert tensor.keys() - {"read_write"} == {"name", "projection"}
            assert tensor.get("read_write", False) == (tensor["name"] == "Outputs")
            for terms in tensor["projection"]:
                assert all(1 <= len(term) <= 2 and known.issuperset(term) for term in terms)
        shares = {name: row[f"{name.lower()}_density"] for name in ("Inputs", "Weights", "Outputs")}
        if row["name"] != "9":  # what is written is the pooled map
            assert row["outputs"] < row["N"] * row["M"] * row["P"] * row["Q"]
            del shares["Outputs"]
        assert given == {name: {"distribution": distribution, "density": share} for name, share in shares.items()}


def test_projections_span_the_tensors(tmp_path: Path) -> None:
    """The sizes that Timeloop makes of the projections are those of the tensors, where there is no padding."""
    net = nn.Conv2d(4, 6, (2, 3), stride=(2, 1), dilation=(1, 2), groups=2)
    (path,) = write_problems(table := densities(net, [images(5, 4, 6, 9)]), tmp_path)
    problem = yaml.safe_load(path.read_text())["problem"]
    for tensor in problem["shape"]["data_spaces"]:
        size = 1
        for terms in tensor["projection"]:
            size *= 1 + sum(
                (problem["instance"][name] - 1) * problem["instance"].get("".join(by), 1) for name, *by in terms
            )
        assert size == table[tensor["name"].lower()][0], tensor["name"]


def test_bad_input_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(EnergyError, match="distribution = 'banded': must be one of hypergeometric, fixed_structured"):
        write_problems(densities(tiny(), [images(2, 3, 16, 16)]), tmp_path / "none", "banded")
    assert not (tmp_path / "none").exists()
    with pytest.raises(EnergyError, match="0 has another shape than in an earlier batch: give images of one size"):
        densities(tiny(), [images(2, 3, 16, 16), images(2, 3, 24, 24)])
    with pytest.raises(EnergyError, match="no batch"):
        densities(tiny(), [])
