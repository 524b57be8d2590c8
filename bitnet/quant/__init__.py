"""Number formats and quantizers: pure functions, tensors in and tensors out. No `nn.Module` lives here."""

from bitnet.quant.affine import (
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantizationError,
    choose_qparams_asymmetric,
    choose_qparams_from_range,
    choose_qparams_symmetric,
    dequantize,
    fake_quantize,
    fake_quantize_ste,
    integer_range,
    quantization_error,
    quantize,
    quantize_symmetric,
)
from bitnet.quant.calibration import Observer, calibrate, choose_qparams_mse
from bitnet.quant.nf4 import NF4Weight, dequantize_nf4, quantize_nf4
from bitnet.quant.packing import pack_codes, packed_width, unpack_codes
from bitnet.quant.ternary import (
    absmean_scale,
    fake_quantize_binary,
    fake_quantize_ternary,
    quantize_binary,
    quantize_ternary,
)

__all__ = [
    "Granularity",
    "NF4Weight",
    "Observer",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "QuantizationError",
    "absmean_scale",
    "calibrate",
    "choose_qparams_asymmetric",
    "choose_qparams_from_range",
    "choose_qparams_mse",
    "choose_qparams_symmetric",
    "dequantize",
    "dequantize_nf4",
    "fake_quantize",
    "fake_quantize_binary",
    "fake_quantize_ste",
    "fake_quantize_ternary",
    "integer_range",
    "pack_codes",
    "packed_width",
    "quantization_error",
    "quantize",
    "quantize_binary",
    "quantize_nf4",
    "quantize_symmetric",
    "quantize_ternary",
    "unpack_codes",
]
