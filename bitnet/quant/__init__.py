"""Number formats and quantizers: pure functions, tensors in and tensors out. No `nn.Module` lives here."""

from bitnet.quant.affine import (
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    choose_qparams_asymmetric,
    choose_qparams_symmetric,
    dequantize,
    fake_quantize,
    integer_range,
    quantize,
    quantize_symmetric,
)
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
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "absmean_scale",
    "choose_qparams_asymmetric",
    "choose_qparams_symmetric",
    "dequantize",
    "fake_quantize",
    "fake_quantize_binary",
    "fake_quantize_ternary",
    "integer_range",
    "pack_codes",
    "packed_width",
    "quantize",
    "quantize_binary",
    "quantize_symmetric",
    "quantize_ternary",
    "unpack_codes",
]
