"""What nbval does not see: that the notebooks have outputs to check, and the parameters that a study sets."""

import ast

import nbformat
import pytest

from eatlib.config import RunConfig
from eatlib.results import ROOT, StudyResults

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert [path.name[:2] for path in NOTEBOOKS] == ["0_", "1_", "2_", "3_", "4_"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_has_outputs_and_no_errors(path):
    """A notebook without outputs passes nbval without anything being checked."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    checked = [c for c in cells if c.outputs and "nbval-ignore-output" not in c.metadata.get("tags", [])]
    assert checked, "nbval would compare nothing"
    assert not [output for output in outputs if output.output_type == "error"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run it top to bottom"


def training_parameters():
    """The parameters of the training notebook and their values."""
    notebook = nbformat.read(ROOT / "notebooks" / "1_train.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    return {statement.target.id: ast.literal_eval(statement.value) for statement in ast.parse(cell.source).body}


def test_the_training_notebook_has_every_field_and_no_other():
    assert [*training_parameters()] == [*RunConfig.model_fields, "start_weights", "work_dir"]


def test_as_it_stands_the_training_notebook_is_compared_with_standard_training_of_the_default_study():
    own = {name: value for name, value in training_parameters().items() if name in RunConfig.model_fields}
    assert own["lambda_"] > 0
    known = StudyResults.load(ROOT / "results" / "reference" / "quick").runs.values()
    assert RunConfig.parse(own | {"lambda_": 0}).hash in [result.config_hash for result in known]


def test_what_is_selected_and_averaged_stands_in_short_cells():
    notebook = nbformat.read(ROOT / "notebooks" / "2_tradeoff.ipynb", as_version=4)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert max(len(source.splitlines()) for source in cells) <= 10
