"""Sends requests to an endpoint: limited, repeated where that can help, counted, and never paid for twice."""

import asyncio
import random
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

from echo4o.endpoints.budget import Account
from echo4o.endpoints.cache import AnswerCache
from echo4o.endpoints.endpoint import CallFault, Endpoint, ModelAnswer
from echo4o.endpoints.limits import CallPolicy, ConcurrencyLimit, RateLimit, StopSignal


@dataclass
class Caller:
    """Calls one endpoint. The request is passed on as it is, so that any [`Endpoint`] can be called.

    Args:
        cache: where answers are kept; None: nowhere.
        run: the name under which this run pays. An answer that it paid for, but did not count before it was killed,
            is counted when it is taken from the cache.
        rate: calls per minute; callers of the same model share one.
    """

    endpoint: Endpoint
    policy: CallPolicy
    limit: ConcurrencyLimit
    stop: StopSignal
    account: Account
    cache: AnswerCache | None = None
    run: str = ""
    rate: RateLimit | None = None
    _failed_in_a_row: int = 0
    _cannot_keep: bool = False

    async def ask(
        self,
        request: Any,
        key: str,
        faults: list[dict],
        is_usable: Callable[[ModelAnswer], bool] = lambda answer: True,
    ) -> ModelAnswer:
        """The answer of this key, kept or new. Raises [`CallFault`]; `faults` receives the fault of every try.

        Only usable answers are kept, and a kept answer that is not usable is asked for again. Every paid answer is
        counted and returned, also if it cannot be kept.
        """
        kept = self.cache.get(key) if self.cache else None
        if kept is not None and is_usable(kept[0]):
            answer, run = kept
            self.account.kept += 1
            if run == self.run:
                self.account.add(key, answer)
            return answer
        answer = await self._try(request, key, faults)
        if self.cache and is_usable(answer):
            self._keep(self.cache, key, answer)
        self.account.add_paid(key, answer)
        return answer

    def _keep(self, cache: AnswerCache, key: str, answer: ModelAnswer) -> None:
        try:
            cache.put(key, answer, self.run)
        except OSError as error:
            if not self._cannot_keep:
                self._cannot_keep = True
                warnings.warn(
                    f"{cache.folder}: answers cannot be kept ({error}); they are used and counted, but a later run "
                    "pays for them again",
                    stacklevel=2,
                )

    async def _try(self, request: Any, key: str, faults: list[dict]) -> ModelAnswer:
        for number in range(1, self.policy.tries + 1):
            await self.limit.enter()
            began = monotonic()
            try:
                if self.endpoint.paid:
                    self.account.require_room()
                if self.rate is not None:
                    await self.rate.wait()
                answer = await self.endpoint.ask(request, key)
            except CallFault as fault:
                faults.append({"kind": fault.kind, "message": str(fault)})
                wait = self._wait_after(fault, number, began)
                failure = fault
            else:
                self.limit.succeeded()
                self._failed_in_a_row = 0
                return answer
            finally:
                self.limit.leave()
            if wait is None:
                self._stop_if_hopeless(failure)
                raise failure
            await self.stop.sleep(wait)
        raise AssertionError("unreachable")

    def _wait_after(self, fault: CallFault, number: int, began: float) -> float | None:
        """Seconds until the next try, or None if there is none."""
        wait = self.policy.first_wait * 2 ** (number - 1)
        wait = min(wait, self.policy.longest_wait) * random.uniform(0.5, 1.0)
        if fault.wait is not None:
            wait = max(fault.wait, wait if fault.wait == 0 else 0.0)
        if fault.kind == "http_429" and wait <= self.policy.longest_request:
            self.limit.slow_down(began, wait)
        if not fault.retry or number == self.policy.tries or wait > self.policy.longest_request:
            return None
        return wait

    def _stop_if_hopeless(self, fault: CallFault) -> None:
        self._failed_in_a_row += 1
        if fault.fatal:
            self.stop.set(ValueError(f"{self.endpoint.name}: {fault} ({fault.kind})"))
        elif fault.retry and self._failed_in_a_row >= self.policy.give_up_after:
            self.stop.set(
                ValueError(
                    f"{self.endpoint.name}: {self._failed_in_a_row} calls in a row failed, the last one with "
                    f"{fault.kind}: {fault}; all answers are kept, run again to continue"
                )
            )


def run_async(make_coroutine: Callable[[], Any]) -> None:
    """Run a coroutine to its end, in a thread of its own where an event loop is already running (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(make_coroutine())
        return
    failure: list[BaseException] = []

    def target() -> None:
        try:
            asyncio.run(make_coroutine())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
