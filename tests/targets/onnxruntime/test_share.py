"""The integer share is that of the graph ONNX Runtime executes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgeship.calibration.graph.onnx_file import load_onnx
from edgeship.targets.base import ConvertOptions
from edgeship.targets.onnxruntime import TARGET

MACS = {
    "plain": 144 * 8 * 27 + 36 * 16 * 72 + 5 * 16,
    "residual": 144 * (8 * 27 + 2 * 8 * 72) + 5 * 8,
    "depthwise": 36 * (8 * 27 + 8 * 9 + 16 * 8) + 5 * 16,
    "concat": 144 * (8 * 27 + 4 * 8 + 8 * 72) + 5 * 12,
}


def test_all_of_an_artifact_is_integer(signed: ir.Model, signed_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "artifact.onnx"
    path.write_bytes(TARGET.convert(signed, ConvertOptions()))
    share = TARGET.integer_share(path)
    assert share.total_macs == MACS[signed_file.stem]
    assert share.integer_macs == share.total_macs
    assert share.float_layers == ()


def test_a_float_model_has_no_integer_share_and_names_its_layers(tiny_models: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "float.onnx"
    path.write_bytes(tiny_models["depthwise"])
    share = TARGET.integer_share(path)
    assert (share.integer_macs, share.total_macs) == (0, MACS["depthwise"])
    assert [layer.split()[0] for layer in share.float_layers] == [
        "Conv_stem", "Conv_depthwise", "Conv_pointwise", "Gemm_logits",
    ]  # fmt: skip


def test_a_layer_left_in_float_is_named_with_its_work(signed_files: dict[str, Path], tmp_path: Path) -> None:
    model = load_onnx(signed_files["plain"])
    conv = next(node for node in model.graph if node.name == "Conv_second")
    weight = conv.inputs[1]
    assert weight is not None
    dequantize = weight.producer()
    assert dequantize is not None
    real = ir.Value(name="real", const_value=ir.Tensor(np.zeros((16, 8, 3, 3), np.float32), name="real"))
    real.shape, real.dtype = ir.Shape((16, 8, 3, 3)), ir.DataType.FLOAT
    model.graph.register_initializer(real)
    conv.replace_input_with(1, real)
    path = tmp_path / "mixed.onnx"
    path.write_bytes(TARGET.convert(model, ConvertOptions()))
    share = TARGET.integer_share(path)
    assert share.float_layers == ("Conv_second (Conv)",)
    assert share.total_macs - share.integer_macs == 36 * 16 * 72


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_what_onnxruntimes_quantizer_leaves_in_float_is_integer_in_the_artifact(
    edgeship_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch", reason="the ResNet comes as PyTorch")
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            rng = np.random.default_rng(0)
            self._left = [rng.normal(size=(1, 3, 32, 32)).astype(np.float32) for _ in range(4)]

        def get_next(self) -> dict[str, Any] | None:
            return {"x": self._left.pop()} if self._left else None

    monkeypatch.syspath_prepend(str(edgeship_data / "models"))
    import cifar_resnet

    network = cifar_resnet.resnet20().eval()
    network.load_state_dict(torch.load(edgeship_data / "models" / "resnet20_cifar10.pt", weights_only=True))
    source = tmp_path / "resnet20.onnx"
    torch.onnx.export(
        network,
        (torch.zeros(1, 3, 32, 32),),
        source,
        input_names=["x"],
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    quantize_static(
        source, tmp_path / "signed.onnx", Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    artifact = tmp_path / "artifact.onnx"
    artifact.write_bytes(TARGET.convert(load_onnx(tmp_path / "signed.onnx"), ConvertOptions()))
    signed, unsigned = TARGET.integer_share(tmp_path / "signed.onnx"), TARGET.integer_share(artifact)
    assert signed.total_macs == unsigned.total_macs == 40_551_040
    assert signed.share < 0.6
    assert len(signed.float_layers) == 10
    assert unsigned.share == 1.0
