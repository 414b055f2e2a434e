"""A network trained with the penalty leaves PyTorch as one that never had it."""

from pathlib import Path

import pytest
import torch
from test_energy import Functional, images
from test_own_network import small_vit
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

from eatlib import ActivationPenalty, build_model
from eatlib.models import with_relus


def networks() -> list[nn.Module]:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="GELU became ReLU"):
        transformer = with_relus(small_vit())
    mobile = mobilenet_v2(num_classes=4, width_mult=0.25)
    return [build_model("resnet18", classes=4, image_size=32, width=1 / 16), Functional(), mobile, transformer]


def trained(model: nn.Module, x: Tensor) -> ActivationPenalty:
    """The penalty of a model that has made one step with it, still attached."""
    penalty = ActivationPenalty(model, sigma=1e-2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    (model.train()(x).square().mean() + penalty()).backward()
    optimizer.step()
    return penalty


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("model", networks(), ids=["resnet18", "functional", "mobilenet_v2", "vit"])
def test_torch_export_sees_no_penalty(model: nn.Module, attached: bool, tmp_path: Path) -> None:
    x = images(3, 3, 32, 32)
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
@pytest.mark.parametrize("model", networks(), ids=["resnet18", "functional", "mobilenet_v2", "vit"])
def test_onnx_gives_the_same_outputs_for_any_batch(model: nn.Module, attached: bool, tmp_path: Path) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    x, path = images(3, 3, 32, 32), tmp_path / "model.onnx"
    penalty = trained(model, x)
    if not attached:
        penalty.detach()
    options = {"dynamic_shapes": ({0: "batch"},), "external_data": False, "verbose": False}
    torch.onnx.export(model.eval(), (x,), path, dynamo=True, **options)
    penalty.detach()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (value.name for value in session.get_inputs())
    for batch in (x, images(5, 3, 32, 32)):
        (exported,) = session.run(None, {name: batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(exported), outputs(model, batch), rtol=0, atol=1e-5)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert not {node.op_type for node in onnx.load(path).graph.node} & {"Pow", "ReduceSum", "Greater"}
    assert b"penalt" not in path.read_bytes()
