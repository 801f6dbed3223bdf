"""The training of a teacher as a function."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from diffdistill.data import as_data, load_data
from diffdistill.denoiser import Denoiser
from diffdistill.models import NetworkDenoiser, build_denoiser, load_autoencoder
from diffdistill.sampling.generation import preview as previewed
from diffdistill.training import Run, Trainer, TrainerConfig
from diffdistill.training.denoising import Denoising
from diffdistill.training.weighting import make_weighting
from diffdistill.workflows import runs
from diffdistill.workflows.levels import noise_levels_for, teacher_levels

PREVIEW = {"w": 1.0, "num_steps": 16, "num_samples": 16}


def train_teacher(
    model: NetworkDenoiser | Mapping[str, Any],
    data: Any,
    *,
    out: runs.Path_ | Run | None = None,
    trainer: Mapping[str, Any] | None = None,
    init: Denoiser | runs.Path_ | None = None,
    noise_levels: Mapping[str, Any] | None = None,
    weighting: str | None = None,
    label_dropout: float | None = None,
    preview: Mapping[str, Any] | None = PREVIEW,
    callbacks: Sequence[Any] = (),
    accept_changes: bool = False,
    made_by: Callable[[Run], Mapping[str, Any]] | None = None,
) -> NetworkDenoiser:
    """Train a denoiser by denoising, with label dropout so that it can be guided (Karras et al. 2022; Ho et al. 2020).

    Args:
        model: from `diffdistill.wrap` or `build_denoiser`, with the weights to begin with; it is not changed. Or a
            config of `build_denoiser`, whose shape and classes are those of the data.
        data: as of `diffdistill.data.as_data`, or options of `load_data`.
        out: folder of the run, or a `Run`; the same call continues an interrupted run there. None keeps no files.
        trainer: settings of `TrainerConfig`, in place of those of `runs.TRAINER`.
        init: a model of the same architecture whose weights to begin with.
        noise_levels: as of `noise_levels_for`; by default as `teacher_levels` says.
        weighting: of the error on x0, as of `make_weighting`; by default "edm" for EDM's preconditioning, else
            "truncated_snr".
        label_dropout: probability of training without the label; by default 0.1 where the model knows a label for no
            class, else 0.
        preview: options of the pictures drawn every `trainer["sample_every"]` updates; None for none.
        callbacks: as of `Trainer`.
        accept_changes: continue a run in that folder although settings differ.
        made_by: what the file says that made it, given the run; by default these arguments.

    Returns:
        The trained model, the average of its weights, on the device it was trained on.

    Raises:
        ValueError: data that are not the model's, or an option out of range.
    """
    if isinstance(model, Mapping):
        opened = load_data(**data) if isinstance(data, Mapping) and "name" in data else as_data(data)
        made = {**model, "data_shape": opened.shape, "num_classes": opened.num_classes}
        autoencoder = None if opened.autoencoder is None else load_autoencoder(opened.autoencoder)
        denoiser = build_denoiser(made, autoencoder=autoencoder)
    else:
        opened, denoiser = runs.opened_data(data, model), copy.deepcopy(model).requires_grad_()
    runs.initialize(denoiser, init)
    config = TrainerConfig.from_dict({**runs.TRAINER, **(trainer or {})})
    levels = teacher_levels(denoiser) if noise_levels is None else noise_levels
    weighting = weighting or ("edm" if levels["name"] == "lognormal" else "truncated_snr")
    dropout = _label_dropout(denoiser, label_dropout)
    record = runs.recorded(
        "train_teacher",
        model=model,
        data=opened,
        init=None if init is None else runs.opened_model(init),
        trainer={**runs.TRAINER, **(trainer or {})},
        noise_levels=noise_levels,
        weighting=weighting,
        label_dropout=dropout,
    )
    with runs.opened_run(out, record, accept_changes=accept_changes) as run:
        if run.finished:
            finished = runs.finished_model(run, denoiser)
            assert isinstance(finished, NetworkDenoiser)
            return finished
        objective = Denoising(
            denoiser,
            noise_levels=noise_levels_for(denoiser, levels),
            weighting=make_weighting(weighting, sigma_data=denoiser.sigma_data),
            label_dropout=dropout,
        )
        pictures = None if preview is None else previewed(denoiser, **preview)
        trained = Trainer(
            objective, opened, config, run, on_samples=pictures, callbacks=callbacks, name="teacher"
        ).train()
        runs.finish(trained, run, (made_by or runs.provenance_of(record))(run))
    assert isinstance(trained, NetworkDenoiser)
    return trained


def _label_dropout(denoiser: Denoiser, wanted: float | None) -> float:
    """The probability of training without the label; refused where the model knows no label for that."""
    if not denoiser.num_classes:
        return 0.0 if wanted is None else wanted
    try:
        denoiser.null_condition(torch.zeros(1, dtype=torch.long))
    except ValueError:
        if wanted:
            raise
        return 0.0
    return 0.1 if wanted is None else wanted
