"""What `gdn.explain` shows: for every backend, whether it can run a call, and why not."""

from __future__ import annotations

from dataclasses import dataclass

from gdn import registry
from gdn.dispatch import find_reasons, parse_request
from gdn.exchange import call_of_a_rank
from gdn.problem import Call, PoolCall, Problem
from gdn.registry import backend_names, find_backend


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one backend can run a problem: it can, by `path`, if there are no reasons against
    it."""

    name: str
    reasons: tuple[str, ...]
    path: str | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """What `gdn.explain` returns: the request and where it was set, the chosen backend, and a
    verdict for every backend."""

    request: str
    source: str
    problem: Problem
    chosen: str | None
    verdicts: tuple[Verdict, ...]

    def __str__(self) -> str:
        lines = [f"problem  {self.problem}", f"request  {self.request} ({self.source})"]
        lines.append(
            f"chosen   {self.chosen or 'none: the call would raise BackendUnsupportedError'}"
        )
        width = max((len(verdict.name) for verdict in self.verdicts), default=0)
        for verdict in self.verdicts:
            why = "; ".join(verdict.reasons) if verdict.reasons else f"can run it ({verdict.path})"
            lines.append(
                f"  {verdict.name:<{width}}  {'no:  ' if verdict.reasons else 'yes: '}{why}"
            )
        if self.problem.batch_invariant:
            p = self.problem
            lines.append(
                f"batch-invariant: {p.N * p.HV} scans side by side, one a sequence and value head, "
                "never in pieces, which few heads of long sequences need to fill a GPU"
                if p.pool is None or p.prefill
                else "batch-invariant: the kernel for any number of states"
            )
        return "\n".join(lines)


def verdict(name: str, problem: Problem, given: Call | PoolCall | None = None) -> Verdict:
    """Whether the named backend can run the problem, and by which path; given: the call, if there
    is one."""
    reasons = find_reasons(name, problem, given)
    if reasons:
        return Verdict(name, tuple(reasons), None)
    backend = find_backend(name)
    try:
        path = backend.path(problem)
        if problem.context_parallel and isinstance(given, Call):
            given = call_of_a_rank(given, backend)
        if given is not None and (source := backend.preparation(given, problem.needs_grad)):
            path += f"; {source}"
        return Verdict(name, (), path)
    except Exception as error:  # the path is for readers; the call runs without it
        return Verdict(name, (), f"unknown, {registry.raised('path', error)}")


def explain(
    request: str, source: str, problem: Problem, given: Call | PoolCall | None = None
) -> Explanation:
    """The verdict for every backend on a problem, in the order of "auto", and the backend that the
    request chooses."""
    every = parse_request("auto")
    every += [name for name in backend_names() if name not in every]
    verdicts = [verdict(name, problem, given) for name in every]
    able = {verdict.name for verdict in verdicts if not verdict.reasons}
    chosen = next((name for name in parse_request(request) if name in able), None)
    return Explanation(request, source, problem, chosen, tuple(verdicts))
