"""minicpt: Context-aware Prompt Tuning (CPT, arXiv 2410.17222) and its family, small enough to read.

Letters used everywhere: B batch rows, K shots (examples in the context), P prefix tokens, T query tokens,
D embedding size, V vocabulary, C classes, L layers, S soft tokens of IAPT.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "dropin.configs": ["CPTConfig", "IAPTConfig", "PeftConfig", "get_peft_config"],
    "dropin.saving": ["load_training_state"],
    "dropin.model": [
        "AutoPeftModelForCausalLM",
        "PeftModel",
        "PeftModelForCausalLM",
        "get_peft_model",
    ],
    "core.embeddings": ["CPTEmbedding", "PromptEmbedding"],
    "core.templates": ["Template", "Encoded", "encode", "build_context"],
    "engine.base_models": ["load_base"],
    "data": ["load_task", "make_split"],
    "methods.registry": ["METHODS"],
    "methods.fit": ["fit"],
    "methods.classifier": ["FewShotClassifier"],
    "lab.cells": ["Cell", "run_cell"],
    "lab.store": ["Store"],
    "lab.executors": ["run_grid"],
    "errors": ["MiniCPTError"],
}
# what code written for PEFT's prompt methods imports besides, and what is PEFT's own here
_PEFT = [
    "LoraConfig",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "TaskType",
    "get_peft_model_state_dict",
    "set_peft_model_state_dict",
]
_MODULE_OF = {
    name: f".{module}" for module, names in _HOME.items() for name in names
} | dict.fromkeys(_PEFT, "peft")
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    # lazy: `import minicpt` must not load torch, transformers or peft (a notebook pays seconds for each)
    if name in _MODULE_OF:
        return getattr(importlib.import_module(_MODULE_OF[name], __name__), name)
    raise AttributeError(f"module 'minicpt' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__():
    return __all__
