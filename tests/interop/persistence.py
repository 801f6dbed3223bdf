"""Pickles in the layout of EDM's `torch_utils.persistence`: objects that carry their source code and their state."""

import contextlib
import io
import pickle
import sys
import types

import torch

SOURCE = "import os\nclass Linear: pass\nos.environ['EXECUTED'] = 'yes'\n"


def _reconstruct_persistent_obj(meta):
    raise AssertionError("a persistent object was reconstructed")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class EasyDict(dict):
    pass


EasyDict.__module__ = "dnnlib.util"


@contextlib.contextmanager
def published_names():
    """The modules that such a pickle names, for the time of writing only."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    util.EasyDict = EasyDict
    modules = {
        "torch_utils": types.ModuleType("torch_utils"),
        "torch_utils.persistence": persistence,
        "dnnlib": types.ModuleType("dnnlib"),
        "dnnlib.util": util,
    }
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


class Persistent(torch.nn.Module):
    """A module that pickles itself as a persistent object of the class `class_name`."""

    def __init__(self, class_name, **attributes):
        super().__init__()
        self.__dict__.update(attributes)
        self.__dict__["class_name"] = class_name

    def __reduce__(self):
        state = {name: value for name, value in self.__dict__.items() if name != "class_name"}
        meta = {
            "type": "class",
            "version": 6,
            "module_src": SOURCE,
            "class_name": self.__dict__["class_name"],
            "state": state,
        }
        return _reconstruct_persistent_obj, (meta,), None


def add(module, name, value):
    """Add the tensor `a.b.weight` to a tree of modules, made where it is missing."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in module._modules:
            module._modules[part] = torch.nn.ModuleDict() if part in ("enc", "dec") else Persistent("Linear")
        module = module._modules[part]
    if leaf in ("resample_filter", "freqs", "u"):
        module.register_buffer(leaf, value)
    else:
        module._parameters[leaf] = torch.nn.Parameter(value)
        module._parameters.setdefault("bias", None)


def network(settings, state):
    """The tree that EDM pickles: a preconditioning around a network, from the settings and the state of one."""
    settings = dict(settings)
    precond, model_type = settings.pop("precond"), settings.pop("model_type")
    outer = Persistent(precond, **{key: settings.pop(key) for key in ("img_resolution", "img_channels", "label_dim")})
    channels = outer.img_channels
    kwargs = {
        "img_resolution": outer.img_resolution,
        "in_channels": channels,
        "out_channels": channels * (2 if precond == "iDDPMPrecond" else 1),
        "label_dim": outer.label_dim,
        **settings,
    }
    outer.__dict__.update(use_fp16=False, _init_args=(), _init_kwargs={**settings, "model_type": model_type})
    ranges = {
        "EDMPrecond": {"sigma_min": 0, "sigma_max": float("inf"), "sigma_data": 0.5},
        "VPPrecond": {
            **{"sigma_min": 0.0010003334, "sigma_max": 152.16, "beta_d": 19.9, "beta_min": 0.1},
            **{"M": 1000, "epsilon_t": 1e-5},
        },
        "VEPrecond": {"sigma_min": 0.02, "sigma_max": 100},
        "iDDPMPrecond": {"sigma_min": 0.0064, "sigma_max": 20291.0, "C_1": 0.001, "C_2": 0.008, "M": 1000},
    }
    outer.__dict__.update(ranges[precond])
    outer._modules["model"] = Persistent(model_type, _init_args=(), _init_kwargs=kwargs)
    outer._modules["model"]._modules["map_augment"] = None
    for name, value in state.items():
        add(outer, name, torch.from_numpy(value))
    return outer


def pickled(content):
    """The bytes of a pickle of the EDM release."""
    buffer = io.BytesIO()
    with published_names():
        pickle.dump(content, buffer)
    return buffer.getvalue()


def release(net):
    """What a file of the EDM release holds around its network."""
    return {
        "ema": net,
        "loss_fn": Persistent("EDMLoss", P_mean=-1.2, P_std=1.2, sigma_data=0.5),
        "augment_pipe": Persistent("AugmentPipe", p=0.12),
        "dataset_kwargs": EasyDict(
            class_name="training.dataset.ImageFolderDataset", path="cifar10.zip", use_labels=False
        ),
    }
