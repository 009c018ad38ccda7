"""`bench/tuning.py`: what a tuned kernel chooses from compiles first, and is timed briefly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from tuning import MILLISECONDS, compiling, timing_briefly, tune_quickly

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


def test_triton_tunes_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the names of the installed Triton, which are not public."""
    module = pytest.importorskip("triton.runtime.autotuner")
    for name in ("prune_configs", "do_bench"):
        monkeypatch.setattr(module.Autotuner, name, vars(module.Autotuner)[name])
    active = SimpleNamespace(get_benchmarker=lambda: print)
    monkeypatch.setattr(module.driver, "_active", active)
    tune_quickly()

    def make(**given: Any) -> Any:
        return module.Autotuner(lambda: None, [], [], [], None, None, **given)

    found = make().do_bench
    assert (found.func, found.keywords) == (print, MILLISECONDS)
    assert make(do_bench=len).do_bench is len
    assert make().prune_configs.__name__ == "prune_and_compile"
