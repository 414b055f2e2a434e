"""A network trained with the penalty leaves PyTorch as one that never had it."""

from pathlib import Path

import pytest
import torch
from test_energy import Functional, images
from torch import Tensor, nn

from eatlib import ActivationPenalty, build_model


def networks() -> list[nn.Module]:
    torch.manual_seed(0)
    return [build_model("resnet18", classes=4, image_size=16, width=1 / 16), Functional()]


def trained(model: nn.Module, x: Tensor) -> ActivationPenalty:
    """The penalty of a model that has made one step with it, still attached."""
    penalty = ActivationPenalty(model, sigma=1e-2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (model.train()(x).square().mean() + penalty()).backward()
    optimizer.step()
    return penalty


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("model", networks(), ids=["modules", "functional"])
def test_torch_export_sees_no_penalty(model: nn.Module, attached: bool, tmp_path: Path) -> None:
    x = images(3, 3, 16, 16)
    without = torch.export.export(model.eval(), (x,))
    penalty = trained(model, x)
    if not attached:
        penalty.detach()
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    program = torch.export.export(model.eval(), (x,))
    assert program.graph_module.code == without.graph_module.code
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    assert torch.equal(outputs(loaded, x), outputs(model, x))
    if attached:  # and goes on
        model.train()(x)
        assert penalty().item() > 0
        penalty.detach()


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("model", networks(), ids=["modules", "functional"])
def test_onnx_gives_the_same_outputs_for_any_batch(model: nn.Module, attached: bool, tmp_path: Path) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    x, path = images(3, 3, 16, 16), tmp_path / "model.onnx"
    penalty = trained(model, x)
    if not attached:
        penalty.detach()
    torch.onnx.export(model.eval(), (x,), path, dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False)
    penalty.detach()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (value.name for value in session.get_inputs())
    for batch in (x, images(5, 3, 16, 16)):
        (exported,) = session.run(None, {name: batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(exported), outputs(model, batch), rtol=0, atol=1e-5)
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert kinds <= {"Add", "Conv", "Div", "Gemm", "ReduceMean", "Relu", "Reshape", "Sub"}
    assert b"penalt" not in path.read_bytes()
