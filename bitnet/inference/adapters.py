"""LoRA adapters on a model that runs: put on and taken off.

    adapter = load_adapter("runs/polite")
    adapter.check(base, name)     the weights are those that it was trained on
    put_on(model, adapter)        in the place of the one before
    take_off(model)

The native engine multiplies the base's codes as it does without an adapter, and adds the adapter's part in floats;
everywhere else the layers of `bitnet/model/lora.py` do.
"""

from bitnet.inference.cpu_engine import Engine
from bitnet.inference.engine import LanguageModel
from bitnet.model import BitNetForCausalLM
from bitnet.model.lora import attach, detach
from bitnet.storage.adapters import Adapter


def put_on(model: LanguageModel, adapter: Adapter) -> None:
    """Run a model with an adapter, which was checked to be of its weights. Raises ValueError for an engine that takes
    none, and for matrices that do not fit."""
    if isinstance(model, Engine):
        model.attach(adapter.matrices)
    elif isinstance(model, BitNetForCausalLM):
        attach(model, adapter.matrices)
    else:
        raise ValueError(
            f"{type(model).__name__} takes no adapter; open the model with it, and it runs layer by layer in torch"
        )


def take_off(model: LanguageModel) -> None:
    """Run a model without an adapter."""
    if isinstance(model, Engine):
        model.attach({})
    elif isinstance(model, BitNetForCausalLM):
        detach(model)
