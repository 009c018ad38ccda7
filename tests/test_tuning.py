"""`bench/tuning.py`: what a tuned kernel chooses from compiles first, and is timed briefly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from tuning import MILLISECONDS, compiling, timing_briefly

CONFIGS = [SimpleNamespace(all_kwargs=lambda n=n: {"num_warps": n}) for n in (2, 4, 8)]


def test_what_is_left_to_time_compiles_in_one_mode() -> None:
    ran: list[dict[str, Any]] = []
    modes: list[int] = []

    @contextmanager
    def mode() -> Iterator[None]:
        yield
        modes.append(len(ran))

    tuner = SimpleNamespace(
        nargs={"x": 1}, fn=SimpleNamespace(run=lambda **given: ran.append(given))
    )
    prune = compiling(lambda tuner, options: CONFIGS[: options["N"]], mode)
    assert prune(tuner, {"N": 1, "warmup": False}) == CONFIGS[:1]
    assert not ran  # nothing to choose from, so nothing is timed
    assert prune(tuner, {"N": 3, "warmup": False}) == CONFIGS
    assert ran == [{"x": 1, "N": 3, "warmup": True, "num_warps": n} for n in (2, 4, 8)]
    assert modes == [3]


def test_a_configuration_is_timed_briefly_unless_its_tuner_has_a_timer() -> None:
    do_bench = timing_briefly(lambda: lambda run, **options: (run(), options))
    timed, options = do_bench(SimpleNamespace(_do_bench=None))(lambda: 3, quantiles=(0.5,))
    assert (timed, options) == (3, MILLISECONDS | {"quantiles": (0.5,)})
    own = object()
    assert do_bench(SimpleNamespace(_do_bench=own)) is own
