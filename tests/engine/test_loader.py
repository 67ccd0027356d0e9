"""The order of the data: complete, a function of (seed, position), the same for any number of workers and processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from itertools import islice
from typing import Any

import pytest
import torch

from rendseg.data import DataError, build_dataset
from rendseg.engine import loader
from rendseg.engine.loader import evaluation_samples, training_batches
from rendseg.engine.order import BatchPositions, SampleOrder
from tests.engine import processes


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    order = SampleOrder(7, seed=3)
    stream = [order[p] for p in range(21)]
    assert [epoch for epoch, _ in stream] == [0] * 7 + [1] * 7 + [2] * 7
    epochs = [[index for _, index in stream[7 * e : 7 * e + 7]] for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [SampleOrder(7, seed=3)[p] for p in (20, 3, 11)] == [stream[20], stream[3], stream[11]]
    assert [SampleOrder(7, seed=4)[p] for p in range(21)] != stream


def test_processes_share_the_stream_without_overlap() -> None:
    order = SampleOrder(10, seed=0)
    whole = [item for batch in BatchPositions(order, 4, 3, 4, 0, 1) for item in batch]
    assert whole == [order[p] for p in range(4, 16)]
    first, second = (list(BatchPositions(SampleOrder(10, seed=0), 4, 3, 2, rank, 2)) for rank in (0, 1))
    assert [item for pair in zip(first, second, strict=True) for part in pair for item in part] == whole


def shapes(**options: Any) -> Any:
    return build_dataset(
        {
            "name": "shapes",
            "size": [64, 64],
            "num_images": 5,
            "num_val_images": 3,
            "scale_range": [0.7, 1.6],
            **options,
        },
        "train",
        augment_seed=9,
    )


def test_workers_and_resumption_do_not_change_the_batches() -> None:
    whole = list(training_batches(shapes(), 1, 0, 6, 2, workers=0))
    for start, workers in ((0, 2), (6, 0), (6, 2)):
        part = list(training_batches(shapes(), 1, start, 6 - start // 2, 2, workers))
        for (images, labels), (wanted_images, wanted_labels) in zip(part, whole[start // 2 :], strict=True):
            assert torch.equal(images, wanted_images) and torch.equal(labels, wanted_labels)
    # Batches 0 and 5 hold images of epochs 0 and 2: the augmentation differs even where the image is the same.
    assert not any(torch.equal(a, b) for a in whole[0][0] for b in whole[5][0])


def test_global_random_numbers_are_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    list(training_batches(shapes(), 1, 0, 2, 2, workers=0))
    list(evaluation_samples(shapes(), 0, [0, 1]))
    assert torch.equal(torch.get_rng_state(), before)


class Broken:
    def __len__(self) -> int:
        return 4

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        if index == 2:
            raise DataError("street_2.png: label value 77 at (0, 0)")
        side = 8 + index
        return {"image": torch.zeros(3, side, side), "label": torch.zeros(side, side).long(), "name": str(index)}


@pytest.mark.bad_input
@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_workers_arrive_as_they_were_written(workers: int) -> None:
    with pytest.raises(DataError) as error:
        list(training_batches(Broken(), 0, 0, 4, 1, workers))
    assert str(error.value) == "street_2.png: label value 77 at (0, 0)"
    with pytest.raises(DataError, match="^street_2.png"):
        list(evaluation_samples(Broken(), workers, [0, 2]))


class Failing(Broken):
    def __init__(self, how: Any) -> None:
        self.how = how

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        return self.how() if index == 2 else super().sample(index % 2, epoch)


@pytest.mark.bad_input
@pytest.mark.parametrize("workers", [0, 1])
def test_any_exception_is_one_line(workers: int) -> None:
    with pytest.raises(DataError) as error:
        list(evaluation_samples(Failing(lambda: {}["depth"]), workers, [0, 2]))
    assert str(error.value) == "image number 2 could not be prepared: KeyError: 'depth'"
    assert "Traceback" in str(error.value.__cause__)


@pytest.mark.bad_input
def test_a_worker_that_is_killed() -> None:
    killed = Failing(lambda: os.kill(os.getpid(), signal.SIGKILL))
    previous = signal.getsignal(signal.SIGCHLD)
    for samples, key in (
        (training_batches(killed, 0, 0, 8, 1, 1), "train"),
        (evaluation_samples(killed, 1, [0, 2]), "eval"),
    ):
        with pytest.raises(
            DataError, match=rf"was killed by SIGKILL; .*set {key}\.num_workers=0.*/dev/shm.*--shm-size"
        ):
            list(samples)
    assert not multiprocessing.active_children() and signal.getsignal(signal.SIGCHLD) is previous


def test_batches_come_through_a_pipe_where_shared_memory_is_full(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: Any) -> None:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    data = shapes()
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    monkeypatch.setattr(loader._warn_of_little_shared_memory, "__defaults__", ([],))
    wanted = list(training_batches(data, 1, 0, 3, 2, 0))
    found = list(training_batches(data, 1, 0, 3, 2, 1))
    for (images, labels), (wanted_images, wanted_labels) in zip(found, wanted, strict=True):
        assert torch.equal(images, wanted_images) and torch.equal(labels, wanted_labels)
    said = capsys.readouterr().err
    assert said.count("rendseg: /dev/shm") == 1 and "--shm-size" in said and "num_workers=0" in said


def test_a_small_shared_memory() -> None:
    """A file system of 64 kB for /dev/shm, of this process alone; a batch takes 160 kB."""
    [(code, out, err)] = processes.launch(processes.load_with_little_shared_memory, timeout=60)
    if "not permitted" in err:
        pytest.skip("mounting a file system is not permitted")
    assert code == 0 and "4 batches, 2 samples" in out, err
    assert err.count("is too small for the batches") == 1


@pytest.mark.bad_input
def test_images_of_different_sizes_and_no_images() -> None:
    broken = Broken()
    broken.sample = lambda index, epoch: Broken.sample(broken, index % 2, epoch)  # type: ignore[method-assign]
    with pytest.raises(DataError, match="differ in size; set data.crop_size"):
        list(training_batches(broken, 0, 0, 2, 4, 0))
    with pytest.raises(DataError, match="no images"):
        SampleOrder(0, 0)


def test_evaluation_order() -> None:
    names = [s["name"] for s in islice(evaluation_samples(shapes(), 2, [4, 0, 3]), 3)]
    assert names == [shapes()[i]["name"] for i in (4, 0, 3)]
