"""Two and four processes compute what one does: losses, checkpoints and samples."""

import shutil
import time

import numpy as np
import pytest
import torch

from diffdistill.denoiser import spread_labels
from diffdistill.distributed import GradientAverage, barrier, gather, rank
from diffdistill.models import save_denoiser
from diffdistill.sampling.plans import plan
from diffdistill.sampling.samples import draw_to
from diffdistill.training import Run, Trainer, TrainerConfig, sharding
from diffdistill.training.denoising import Denoising
from diffdistill.training.noise_levels import make_noise_levels
from diffdistill.training.weighting import make_weighting
from tests.builders import tiny_denoiser
from tests.training.several import several

pytestmark = pytest.mark.skipif(torch.__version__ < "2.7", reason="parallel=fsdp needs a later PyTorch")
LABELS = spread_labels(7, 4)


class Images:
    """24 images in 4 classes."""

    def __init__(self):
        self.x = torch.randn(24, 2, 8, 8, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "y": torch.tensor(index % 4)}

    def tensors(self):
        return {"x": self.x, "y": torch.arange(24) % 4}


def train(path, *, updates=50, frozen=False, **changes):
    """Train a tiny U-Net, or its biases and norms alone; the losses, and the state of the averaged model."""
    denoiser = tiny_denoiser()
    for parameter in denoiser.parameters():
        parameter.requires_grad_(parameter.ndim == 1 or not frozen)
    objective = Denoising(denoiser, noise_levels=make_noise_levels("lognormal"), weighting=make_weighting("edm"))
    settings = {"updates": updates, "batch_size": 4, "log_every": 1, "checkpoint_every": 30, "learning_rate": 1e-3}
    config = TrainerConfig(**{**settings, "device": "cpu", "clip": 1.0, "ema_half_life": 100.0, **changes})
    run = Run(path, {})
    pictures = []
    trainer = Trainer(objective, Images(), config, run, on_samples=lambda model: draw(model, pictures))
    model = trainer.train()
    if rank() == 0:
        save_denoiser(model, path / "model.safetensors")
    parts = [p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in trainer.parameters]
    return {
        "losses": [record["loss"] for record in run.metrics()],
        "norms": [record["grad_norm"] for record in run.metrics()],
        "model": {name: value.clone() for name, value in model.state_dict().items()},
        "held": sum(parts),
        "pictures": pictures,
    }


def draw(model, pictures):
    with torch.no_grad():
        x = model(torch.ones(2, 2, 8, 8), torch.full((2,), 3.0), torch.tensor([0, 1]))
    pictures.append(x)
    return x[:, :1]  # grids have 1 or 3 channels


def work(folder):
    """All that two processes do in these tests, in one go, since starting them takes longer than the work."""
    results = {
        "ddp": train(folder / "ddp", accumulation=2),
        "fsdp": train(folder / "fsdp", parallel="fsdp", accumulation=2, sample_every=25, channels_last=True),
    }
    # 30 updates by one process, then 20 by two
    results["resumed"] = train(folder / "one", parallel="fsdp")
    results["found"] = {name: found_in_harmed(folder, name) for name in HARMS}
    results["again"] = train(folder / "bit flipped", parallel="fsdp", accumulation=2, channels_last=True)
    train(folder / "frozen", parallel="fsdp", updates=2, frozen=True)
    results["frozen"] = train(folder / "frozen", parallel="fsdp", updates=4, frozen=True)
    results["full disk"] = full_disk(folder / "full disk")
    planned = plan(tiny_denoiser(), num_steps=3)
    results["samples"] = draw_to(folder / "parts", planned, range(5, 12), LABELS, key="", batch_size=2).x
    results["errors"] = [
        message(lambda: train(folder / "odd", batch_size=3)),
        message(lambda: draw_to(folder / "few", planned, range(1), None, key="")),
    ]
    results["gradients"] = averaged_gradients()
    results["finished"] = seen_finished(folder / "mark")
    return results


def flip_a_bit(checkpoints):
    path = checkpoints / "0000050.2of2.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


HARMS = {
    "bit flipped": flip_a_bit,
    "part missing": lambda checkpoints: (checkpoints / "0000050.2of2.pt").unlink(),
    "killed before the record": lambda checkpoints: (checkpoints / "0000050.json").unlink(),
}


def found_in_harmed(folder, name):
    """The update that each process goes on from, in a copy of a run whose newest checkpoint is harmed."""
    if rank() == 0:
        shutil.copytree(folder / "fsdp", folder / name)
        HARMS[name](folder / name / "checkpoints")
    barrier()
    return Run(folder / name, {}).load_checkpoint().update


def full_disk(path):
    """The error, and the files that are left, when process 1 cannot write its part of the second checkpoint."""
    train(path, parallel="fsdp", updates=1)

    def full(state, file, save=torch.save):
        save(state, file)
        if rank() == 1:
            raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", full)
        error = message(lambda: train(path, parallel="fsdp", updates=2))
    barrier()
    return error, names(path)


def names(path):
    return sorted(file.name for file in (path / "checkpoints").iterdir())


def seen_finished(folder):
    """What each process is told of a run that process 0 marks as finished before process 1 looks."""
    run = Run(folder, {})
    if rank():
        time.sleep(0.5)
    before = run.finished
    if not before:
        run.finish()
    return before, run.finished


def uneven_rows():
    """Whether 1 to 9 rows, split over the processes, are read back as they were, from whole tensors and from pieces."""
    module = torch.nn.ParameterList(
        [torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) for n in range(1, 10)]
    )
    whole = {name: value.clone() for name, value in module.state_dict().items()}
    sharding.shard(module, torch.device("cpu"))
    before = [sharding.local(value).clone() for value in module.state_dict().values()]
    common, pieces = sharding.separate(module.state_dict())
    same = []
    for saved in (whole, sharding.join(common, gather(pieces))):
        for value in module.state_dict().values():
            sharding.local(value).zero_()
        sharding.load_module(module, saved)
        same += [torch.equal(sharding.local(v), b) for v, b in zip(module.state_dict().values(), before, strict=True)]
    return same


def work_of_four(folder):
    """What four processes do: the first updates, the last ones of a run begun by two, and samples."""
    return {
        "first": train(folder / "four", updates=6),
        "resumed": train(folder / "begun by two", parallel="fsdp", updates=55),
        "uneven": uneven_rows(),
        "samples": draw_to(
            folder / "parts of four", plan(tiny_denoiser(), num_steps=3), range(5, 12), LABELS, key="", batch_size=2
        ).x,
    }


def message(action):
    try:
        action()
    except ValueError as error:
        return str(error)
    return "no error"


def averaged_gradients():
    """The gradients of three parameters, in buckets of one, where the loss leaves the second one out."""
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    average = GradientAverage(weights)
    for last in (False, True):
        with average.during_backward(last):
            ((rank() + 1) * weights[0] + weights[2] ** (rank() + 2)).sum().backward()
    average.finish()
    return [None if w.grad is None else w.grad.tolist() for w in weights]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    whole = train(folder / "whole")
    train(folder / "one", updates=30)
    return folder, whole


@pytest.fixture(scope="module")
def two(one):
    results = several(2, work, one[0])
    shutil.copytree(one[0] / "fsdp", one[0] / "begun by two")
    return results


@pytest.fixture(scope="module")
def four(one, two):
    return several(4, work_of_four, one[0])


@pytest.fixture(scope="module")
def longer(one):
    """The losses of one process over 55 updates."""
    return train(one[0] / "whole", updates=55)["losses"]


@pytest.mark.parametrize("how", ["ddp", "fsdp", "resumed"])
def test_two_processes_have_the_losses_of_one(one, two, how):
    expected, found = one[1], two[0][how]
    assert len(found["losses"]) == 50
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-5)
    np.testing.assert_allclose(found["norms"], expected["norms"], rtol=1e-4)
    for name, value in expected["model"].items():
        if name.endswith("qkv.bias"):
            continue  # softmax is blind to the keys' bias: its gradient is rounding noise, which Adam scales to one
        # A tenth of one update of Adam, which scales up the rounding of gradients near 0.
        torch.testing.assert_close(found["model"][name], value, rtol=1e-4, atol=1e-4)


def test_both_processes_get_the_whole_model(two):
    for how in ("ddp", "fsdp"):
        torch.testing.assert_close(two[1][how]["model"], two[0][how]["model"], rtol=0, atol=0)


def test_split_parameters_lie_in_parts_and_can_be_evaluated_while_training(one, two):
    total = one[1]["held"]
    parts = [result["fsdp"]["held"] for result in two]
    assert sum(parts) == total and max(parts) < 0.6 * total
    assert two[0]["ddp"]["held"] == total
    pictures = two[0]["fsdp"]["pictures"]
    assert len(pictures) == 2
    model = tiny_denoiser().eval()
    model.load_state_dict(one[1]["model"])
    expected = []
    draw(model, expected)
    torch.testing.assert_close(pictures[-1], expected[0], rtol=1e-4, atol=1e-4)


PARTS_OF_50 = ["0000050.1of2.pt", "0000050.2of2.pt", "0000050.json"]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_one_process_reads_the_checkpoint_of_two(one, two, longer, how, tmp_path):
    shutil.copytree(one[0] / how, tmp_path, dirs_exist_ok=True)
    again = train(tmp_path, updates=55)
    assert len(again["losses"]) == 55
    np.testing.assert_allclose(again["losses"], longer, rtol=1e-5)
    earlier = PARTS_OF_50 if how == "fsdp" else ["0000050.json", "0000050.pt"]
    assert names(tmp_path) == [*earlier, "0000055.json", "0000055.pt"]


@pytest.mark.parametrize("processes", [2, 4])
def test_each_process_writes_its_share(one, two, four, processes):
    folder = one[0] / ("fsdp" if processes == 2 else "begun by two") / "checkpoints"
    files = sorted(folder.glob(f"*of{processes}.pt"))[-processes:]
    parts = [torch.load(file, weights_only=True) for file in files]
    held = [sum(t.untyped_storage().nbytes() for t in part["pieces"].values()) for part in parts]
    assert sum(held) == 4 * 4 * one[1]["held"]  # weights, average and two moments, nothing twice
    assert max(held) < 1.2 * sum(held) / processes and not any(part["common"] for part in parts[1:])
    whole = (one[0] / "ddp/checkpoints/0000050.pt").stat().st_size
    assert all(file.stat().st_size < (1 / processes + 0.2) * whole for file in files)  # 0.2 for the names


def test_two_processes_continue_from_their_parts_bit_for_bit(two):
    for result in two:
        assert result["again"]["losses"] == result["fsdp"]["losses"]
        torch.testing.assert_close(result["again"]["model"], result["fsdp"]["model"], rtol=0, atol=0)


def test_a_harmed_part_gives_way_to_the_checkpoint_before_in_every_process(two):
    for result in two:
        assert result["found"] == dict.fromkeys(HARMS, 30)


@pytest.mark.parametrize(("harm", "said"), [("bit flipped", "is damaged: its hash"), ("part missing", "No such file")])
def test_one_process_verifies_all_parts(one, two, harm, said, tmp_path, caplog):
    shutil.copytree(one[0] / "fsdp", tmp_path, dirs_exist_ok=True)
    HARMS[harm](tmp_path / "checkpoints")
    assert Run(tmp_path, {}).load_checkpoint().update == 30
    assert "0000050.2of2.pt" in caplog.text and said in caplog.text and "going back" in caplog.text


def test_parts_without_a_record_are_removed(one, two, tmp_path):
    shutil.copytree(one[0] / "killed before the record", tmp_path, dirs_exist_ok=True)
    parts_of_30 = [name.replace("50", "30") for name in PARTS_OF_50]
    assert names(tmp_path) == [*parts_of_30, *PARTS_OF_50[:2]]
    Run(tmp_path, {}).save_checkpoint(50, {})
    assert names(tmp_path) == [*parts_of_30, "0000050.json", "0000050.pt"]


def test_a_full_disk_of_one_process_stops_all_and_keeps_the_last_checkpoint(one, two):
    folder = one[0] / "full disk/checkpoints"
    for result in two:
        error, left = result["full disk"]
        assert left == ["0000001.1of2.pt", "0000001.2of2.pt", "0000001.json"]
        assert error == (
            f"could not write the checkpoint {folder / '0000002.2of2.pt'} ([Errno 28] No space left on device): "
            f"the last good one is {folder / '0000001.json'}"
        )


def test_frozen_weights_are_split_but_neither_moved_nor_saved(one, two, tmp_path):
    expected, found = train(tmp_path, updates=4, frozen=True), two[0]["frozen"]
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-5)
    moved = {
        name for name, value in tiny_denoiser().state_dict().items() if not torch.equal(found["model"][name], value)
    }
    trained = {name for name, parameter in tiny_denoiser().named_parameters() if parameter.ndim == 1}
    assert moved == trained
    part = torch.load(one[0] / "frozen/checkpoints/0000004.1of2.pt", weights_only=True)
    assert {place[1] for place in part["pieces"] if place[0] == "average"} == trained


def test_four_processes_have_the_losses_of_one_and_go_on_from_two(four, longer):
    assert len(four[0]["first"]["losses"]) == 6 and len(four[0]["resumed"]["losses"]) == 55
    np.testing.assert_allclose(four[0]["first"]["losses"], longer[:6], rtol=1e-5)
    np.testing.assert_allclose(four[0]["resumed"]["losses"], longer, rtol=1e-5)


def test_rows_that_do_not_divide_are_read_back(four):
    assert [result["uneven"] for result in four] == [[True] * 18] * 4


def test_samples_do_not_depend_on_the_number_of_processes(one, two, four):
    planned, threads = plan(tiny_denoiser(), num_steps=3), torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the two has: convolutions round differently on several
    alone = draw_to(one[0] / "alone", planned, range(5, 12), LABELS, key="", batch_size=2).x
    torch.set_num_threads(threads)
    for found in (*two, *four):
        assert torch.equal(found["samples"], alone)


def test_what_does_not_divide_is_named_in_one_line(two):
    for result in two:
        assert result["errors"] == [
            "batch_size=3 does not divide into 2 processes x accumulation=1 equal parts",
            "num_samples=1 is less than one for each of the 2 processes",
        ]


def test_gradients_are_means_also_where_a_parameter_is_unused(two):
    # Summed over two backward passes: 2 (1 + 2) / 2, and 2 (2 + 3) / 2.
    for result in two:
        assert result["gradients"] == [[3.0] * 3, None, [5.0] * 3]


def test_processes_agree_on_whether_a_run_is_finished(two):
    assert [result["finished"] for result in two] == [(False, True)] * 2


def test_recomputed_activations_change_nothing(one, tmp_path):
    again = train(tmp_path, updates=3, recompute=True)
    assert again["losses"] == one[1]["losses"][:3]


def test_recomputation_keeps_less_for_the_backward_pass():
    from diffdistill.training.sharding import recompute

    def saved(model):
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.ones(2, 2, 8, 8), torch.ones(2), torch.tensor([0, 1]))
        return count

    model = tiny_denoiser()
    whole = saved(model)
    recompute(model)
    assert saved(model) < 0.7 * whole
