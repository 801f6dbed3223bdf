"""One trainer for every objective. It knows nothing of diffusion."""

from __future__ import annotations

import copy
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

import diffdistill.distributed as distributed
from diffdistill.devices import channels_last, device_of, tuned_convolutions
from diffdistill.errors import one_line
from diffdistill.reports.progress import shows_bars
from diffdistill.training import sharding
from diffdistill.training.average import WeightAverage
from diffdistill.training.batches import Batches, DataError, MapData, split
from diffdistill.training.callbacks import Callback, Pictures, as_callback
from diffdistill.training.checkpoints import CheckpointError
from diffdistill.training.config import TrainerConfig
from diffdistill.training.journal import Journal, NonFiniteLossError
from diffdistill.training.objective import Loss, Objective
from diffdistill.training.optimizers import make_optimizer
from diffdistill.training.precision import Precision, choose_precision
from diffdistill.training.progress import Pace
from diffdistill.training.randomness import BatchGenerator, seed_from
from diffdistill.training.run import Run
from diffdistill.training.signals import Agreement, Interrupted, StopRequest
from diffdistill.training.trackers import tracked
from diffdistill.training.weights import description

logger = logging.getLogger(__name__)


class _GivenUpError(Exception):
    """An update that was left before it changed anything, since someone waits for the run to stop."""


class Trainer:
    """Trains `objective.trained`; continues where the newest checkpoint of the run left off.

    What an update computes is a function of the state before it and of (seed, update): its samples, its noise and its
    dropout masks. So a resumed run equals an uninterrupted one, bit for bit on the CPU. The batch is split by place
    over processes and accumulated parts, so the number of either changes a run by rounding only.

    Nothing in an update waits for the device: losses are looked at every `log_every` updates and before a checkpoint.

    Args:
        objective: what to minimise; it is moved to the device.
        data: a map-style data set of dicts of tensors, or None (see `batches.Batches`).
        config: the settings.
        run: the folder to write to.
        on_samples: maps the model (averaged, if there is an average) to samples `[N, ...]`, such as images in [-1, 1];
            they become a picture in `samples/` every `sample_every` updates.
        callbacks: what is told of updates and of the log: `Callback` objects, or functions `(trainer, record)` that are
            called after each line of the log.
        name: shown on the progress bar.

    Raises:
        ValueError: a batch that does not divide, an empty data set, a device that is not there, or a model that cannot
            be split.
        TypeError: a callback that is none.
    """

    def __init__(
        self,
        objective: Objective,
        data: MapData | None,
        config: TrainerConfig,
        run: Run,
        *,
        on_samples: Callable[[Any], Tensor] | None = None,
        callbacks: Sequence[Callback | Callable[[Trainer, Mapping[str, Any]], object]] = (),
        name: str = "",
    ) -> None:
        self.config, self.run, self.name = config, run, name
        self.callbacks = [Pictures(on_samples), *map(as_callback, callbacks)]
        self.device = device_of(config.device)
        self.objective = objective.to(self.device)
        if config.channels_last:
            channels_last(self.objective)
        splits = distributed.world_size() > 1 and config.parallel == "fsdp"
        if splits and type(objective.trained).forward is nn.Module.forward:
            kind = type(objective.trained).__name__
            raise ValueError(f"parallel=fsdp is for models that are called as a whole, which {kind} is not: choose ddp")
        distributed.same_weights(objective.trained)
        frozen = {name: p for name, p in objective.trained.named_parameters() if not p.requires_grad}
        self._frozen = frozenset(frozen)
        # What is frozen is the same in the average, so that memory holds it once, until both are split.
        shared = {id(p): p for p in frozen.values()}
        averaged = None if config.ema_half_life is None else copy.deepcopy(objective.trained, shared)
        self._result = self._split(averaged) if splits else None
        self.parameters = [p for p in objective.trained.parameters() if p.requires_grad]
        self.gradients = distributed.GradientAverage(self.parameters if self._result is None else [])
        self.optimizer = make_optimizer(self.parameters, config)
        self.average = None if averaged is None else WeightAverage(objective.trained, averaged)
        if config.recompute:
            sharding.recompute(objective.trained)
        self.update = 0
        self.journal = Journal()
        self._batches, self._generators = self._share_of_batch(data)
        self._started, self._seconds_before = time.monotonic(), 0.0
        self._saved_at = self._started
        self._stop = StopRequest()
        self._started_at, self._agreement = 0, Agreement()
        self.precision = config.precision

    def _split(self, averaged: nn.Module | None) -> nn.Module:
        """Split the model and its average over the processes; a whole copy on the CPU, to hold the result."""
        copied = sharding.copy_on_cpu(self.objective.trained)
        for module in (self.objective.trained, averaged):
            if module is not None:
                sharding.shard(module, self.device)
        return copied

    def _share_of_batch(self, data: MapData | None) -> tuple[Batches, list[BatchGenerator]]:
        """The rows of the batch that this process takes, and the generators of its parts."""
        config, world = self.config, distributed.world_size()
        if config.batch_size % (world * config.accumulation):
            raise ValueError(
                f"batch_size={config.batch_size} does not divide into {world} processes x "
                f"accumulation={config.accumulation} equal parts"
            )
        share = config.batch_size // world
        start, part = share * distributed.rank(), share // config.accumulation
        generators = [
            BatchGenerator(self.device, start + i * part, part, config.batch_size) for i in range(config.accumulation)
        ]
        rows = slice(start, start + share)
        batches = Batches(data, config.batch_size, config.seed, rows=rows, device=self.device, workers=config.workers)
        return batches, generators

    @property
    def splits(self) -> bool:
        """Whether the model is split over the processes, which then evaluate it together."""
        return self._result is not None

    @property
    def model(self) -> nn.Module:
        """What is evaluated: the average of the weights, or the weights where there is no average."""
        return self.objective.trained if self.average is None else self.average.module

    def train(self) -> nn.Module:
        """Run the updates that are left, and return `model` in eval mode; one that was split comes whole, on the CPU.

        Raises:
            NonFiniteLossError: a loss that is not finite; the last good checkpoint is kept.
            CheckpointError: a checkpoint that cannot be read, does not fit, or cannot be written.
            DataError: the data could not be read any more; the last good checkpoint is kept.
            ValueError: another program trains in the folder of the run.
            Interrupted: SIGTERM or SIGINT; a checkpoint was written.
        """
        forked = torch.random.fork_rng(devices=_cuda_index(self.device))
        with self.run.held(), StopRequest() as self._stop, forked, tuned_convolutions():
            self._resume()
            if self.update < self.config.updates:
                with tracked(self):
                    self._loop()
        self.objective.eval()
        model = self.model if self._result is None else sharding.gather_into(self._result, self.model)
        return model.eval()

    def _loop(self) -> None:
        config = self.config
        self._started = self._saved_at = time.monotonic()
        self._started_at = self.update
        self.objective.train()
        prepared = False
        hidden = distributed.rank() != 0 or not shows_bars()
        with tqdm(total=config.updates, initial=self.update, desc=self.name or None, disable=hidden) as bar:
            for batch in self._read_batches():
                self._stop.waits_for = f"update {self.update + 1} to end"
                try:
                    prepared = prepared or self._prepare(batch)
                    self._step(batch)
                except _GivenUpError:
                    self.optimizer.zero_grad(set_to_none=True)
                    self.save()
                    self._end(bar, self._stop.signum or 0)
                self.update += 1
                bar.update()
                done = self.update == config.updates
                if self._log_due():
                    self._write_log(bar)
                for callback in self.callbacks:
                    callback.on_update(self)
                stopped = self._stopped()
                if done or stopped or self._checkpoint_due():
                    self.save()
                if stopped:
                    self._end(bar, stopped)
        for callback in self.callbacks:
            callback.on_end(self)

    def _prepare(self, batch: Mapping[str, Tensor]) -> bool:
        """Choose the precision and compile the networks, in that order, given the first batch."""
        if self.config.precision == "auto":
            self.precision = self.run.decided(
                "precision", lambda: choose_precision(self.device, partial(self._try, batch))
            )
        if self.config.compile:
            self.objective.compile_networks()
        return True

    def _end(self, bar: Any, signum: int) -> NoReturn:
        bar.close()
        if distributed.rank() == 0:
            print(f"stopped at update {self.update}; run it again to continue", file=sys.stderr)
        raise Interrupted(signum)

    def _log_due(self) -> bool:
        """Whether a line of the log follows the update that was done last."""
        return self.update % self.config.log_every == 0 or self.update == self.config.updates

    def _read_batches(self) -> Iterator[dict[str, Tensor]]:
        try:
            yield from self._batches(range(self.update, self.config.updates))
        except DataError as error:
            raise DataError(f"{error}: {self._kept()}") from error

    def _step(self, batch: Mapping[str, Tensor]) -> None:
        """One update: the optimiser steps that the objective makes of one batch."""
        config, k = self.config, self.update
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(k)
        streams, changed = self._streams(batch), False
        while self._optimizer_step(streams, changed):
            changed = True
        if self.average is not None:
            self.average.update(config.ema_decay_at(k))

    def _streams(self, batch: Mapping[str, Tensor]) -> list[Iterator[Loss]]:
        """The losses of each part of a batch, and all generators where the update begins."""
        config, k = self.config, self.update
        self.objective.progress = k / config.updates
        self._seed_network(seed_from(config.seed, "network", k, self._generators[0].start))
        if config.channels_last:
            batch = {n: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for n, t in batch.items()}
        return [
            iter(self.objective.losses(part, generator.reseed(config.seed, "batch", k)))
            for part, generator in zip(split(batch, config.accumulation), self._generators, strict=True)
        ]

    def _try(self, batch: Mapping[str, Tensor], precision: Precision) -> None:
        """The first loss of an update and its gradient, for the time that they take: the state stays as it is."""
        if self._stop.signum and distributed.world_size() == 1:
            raise _GivenUpError
        buffers = {name: tensor.clone() for name, tensor in self.objective.named_buffers()}
        state = copy.deepcopy(self.objective.extra_state())
        try:
            loss = self._next_loss(self._streams(batch)[0], precision)
            if loss is not None:
                loss.value.backward()
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            for name, tensor in self.objective.named_buffers():
                tensor.copy_(buffers[name])
            self.objective.load_extra_state(state)

    def _next_loss(self, stream: Iterator[Loss], precision: str) -> Loss | None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return next(stream, None)

    def _give_up_if_asked(self) -> None:
        """Leave an update that is still to change something, where it can be made again, once it takes too long."""
        if self._stop.overdue and distributed.world_size() == 1 and self._repeatable():
            raise _GivenUpError

    def _repeatable(self) -> bool:
        """Whether losses change nothing that a checkpoint holds: neither buffers nor a state of the objective."""
        trained = self.objective.trained
        return not self.objective.extra_state() and len(trained.state_dict()) == len(list(trained.parameters()))

    def _seed_network(self, seed: int) -> None:
        """Seed what dropout draws from; `torch.manual_seed` takes longer, since it looks at every device."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index].manual_seed(seed)

    def _optimizer_step(self, streams: list[Iterator[Loss]], changed: bool) -> bool:
        """Accumulate the next loss of every part and step; False once the objective has no more."""
        logs: list[dict[str, Tensor]] = []
        for i, stream in enumerate(streams):
            loss = self._next_loss(stream, self.precision)
            if loss is None:
                continue
            if not changed:
                self._give_up_if_asked()
            last = i == len(streams) - 1
            sharding.reduce_gradients(self.objective.trained, last)
            with self.gradients.during_backward(last):
                (loss.value if len(streams) == 1 else loss.value / len(streams)).backward()
            if not changed:
                self._give_up_if_asked()
            logs.append({"loss": loss.value.detach(), **{n: v.detach() for n, v in loss.logs.items()}})
        if not logs:
            return False
        if len(logs) != len(streams):
            raise RuntimeError(f"{type(self.objective).__name__} yields different numbers of losses for equal parts")
        self.gradients.finish()
        if self.config.clip is not None:
            norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
            logs[0]["grad_norm"] = sharding.full_tensor(norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.journal.add(self.update + 1, logs)
        return True

    def _write_log(self, bar: Any) -> None:
        """Check the losses since the last line, and write their means."""
        self._check_finite()
        means = self.journal.take()
        seconds = self._seconds()
        record = {
            "update": self.update,
            "samples": self.update * self.config.batch_size,
            **means,
            "learning_rate": self.config.learning_rate_at(self.update - 1),
            "seconds": round(seconds, 3),
        }
        self.run.log(record)
        for callback in self.callbacks:
            callback.on_log(self, record)
        self._agreement.set(self.update - self._started_at, time.monotonic() - self._started)
        pace = self._pace()
        bar.set_postfix_str(f"loss {means['loss']:.4g}, {pace.images_per_second}")
        if bar.disable and distributed.rank() == 0:
            place = f"{self.name and f'{self.name}: '}update {self.update} of {self.config.updates}"
            logger.info("%s, loss %.4g, %s, %s left", place, means["loss"], pace.images_per_second, pace.time_left)

    def _pace(self) -> Pace:
        """How fast this process goes on since it began or continued the run."""
        done, seconds = self.update - self._started_at, time.monotonic() - self._started
        return Pace(seconds / max(done, 1), self.config.batch_size, self.config.updates - self.update)

    def _check_finite(self) -> None:
        try:
            self.journal.fetch()
        except NonFiniteLossError as error:
            raise NonFiniteLossError(f"{error}: {self._kept()}", update=error.update) from None

    def _kept(self) -> str:
        last = self.run.newest_checkpoint()
        return f"the last good checkpoint is {last}" if last else "there is no checkpoint before it"

    def _stopped(self) -> int:
        """The signal that asks to stop, or 0. Several processes agree on it now and then."""
        signum = self._stop.signum or 0
        if distributed.world_size() == 1:
            return signum
        return distributed.largest(signum) if self._agree_due() else 0

    def _agree_due(self) -> bool:
        """Whether several processes compare what they were told: about once a second, and when they log."""
        return self._agreement.due(self.update) or self._log_due()

    def _checkpoint_due(self) -> bool:
        config = self.config
        if config.checkpoint_every and self.update % config.checkpoint_every == 0:
            return True
        if config.checkpoint_minutes is None:
            return False
        due = time.monotonic() - self._saved_at > 60 * config.checkpoint_minutes
        if distributed.world_size() == 1:
            return due
        return bool(distributed.from_main(int(due))) if self._agree_due() else False

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def save(self) -> None:
        """Write a checkpoint of the state after `update` updates, unless a loss or a weight is not finite."""
        self._check_finite()
        norms = torch._foreach_norm([sharding.local(p.detach()) for p in self.parameters])
        if not bool(distributed.mean(torch.stack(norms)).isfinite().all()):
            raise NonFiniteLossError(f"a weight is not finite after update {self.update}", update=self.update)
        state = {
            "model": description(self.objective.trained),
            "trained": self._learned(self.objective.trained),
            "average": {} if self.average is None else self._learned(self.average.module),
            "optimizer": self.optimizer.state_dict(),
            "objective": self.objective.extra_state(),
            "journal": self.journal.state(),
            "seconds": self._seconds(),
        }
        self.run.save_checkpoint(self.update, state, keep=self.config.keep)
        self._saved_at = time.monotonic()

    def _learned(self, module: nn.Module) -> dict[str, Tensor]:
        """The state without the parameters that are frozen, such as those that adapters leave alone."""
        return {name: value for name, value in module.state_dict().items() if name not in self._frozen}

    def _resume(self) -> None:
        """Take the state of the newest good checkpoint, if there is one."""
        checkpoint = self.run.load_checkpoint()
        if checkpoint is None:
            self.run.rewind(0)
            return
        state = checkpoint.state
        try:
            sharding.load_module(self.objective.trained, state["trained"], keep=self._frozen)
            if self.average is not None:
                sharding.load_module(self.average.module, state["average"], keep=self._frozen)
            sharding.load_optimizer(self.optimizer, state["optimizer"])
            self.objective.load_extra_state(state["objective"])
            self.journal.load(state["journal"])
            self._seconds_before = state["seconds"]
        except (KeyError, RuntimeError, ValueError) as error:
            reason = one_line(error)
            raise CheckpointError(f"the checkpoint {checkpoint.path} is not one of this model: {reason}") from error
        self.update = checkpoint.update
        self.run.rewind(self.update)
        logger.info("continuing from %s", checkpoint.path)


def _cuda_index(device: torch.device) -> list[int]:
    return [device.index] if device.type == "cuda" else []
