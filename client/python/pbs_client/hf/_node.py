"""Prompts prefilled at a server, several at a time.

The caches come inline: in the reply of the prefill itself, each layer as soon as it is
ready. So the server holds nothing for a call that has ended, however it ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from pbs_client._prefill import PrefillResult
from pbs_client._transport import CallScope, Deadline
from pbs_client.client import Client
from pbs_client.errors import ResourceExhaustedError
from pbs_client.options import Attention
from pbs_client.prefill_options import Inline


@dataclass(frozen=True)
class PrefillNode:
    """A server's model, and how its prefills are asked for.

    Threading: prefilled() may be called from many threads at once.

    Attributes:
        client: of the server.
        name: the model's name at the server.
        attention: as Client.prefill().
        kv_dtype: as Inline.dtype.
        wire_dtype: as Inline.wire_dtype.
        concurrency: prefills under way at once, of one prefilled().
        timeout: seconds for each prompt, waits included; None is no limit.
    """

    client: Client
    name: str
    attention: Attention
    kv_dtype: str | None
    wire_dtype: str | None
    concurrency: int
    timeout: float | None

    def prefilled(
        self, prompts: Iterable[Sequence[int]]
    ) -> Generator[PrefillResult, None, None]:
        """The results of prompts, in their order, with their caches.

        Closing it cancels what is under way, as an error does. A server that is at a
        limit and states when to try again is asked again.

        Raises:
            PbsError: as soon as a prompt has failed.
        """
        scope = CallScope()
        waiting: deque[Future[PrefillResult]] = deque()
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                for prompt in prompts:
                    if len(waiting) == self.concurrency:
                        yield _first(waiting)
                    waiting.append(pool.submit(self._prefill, prompt, scope))
                while waiting:
                    yield _first(waiting)
            finally:
                for future in waiting:
                    future.cancel()
                scope.cancel()

    def _prefill(self, prompt: Sequence[int], scope: CallScope) -> PrefillResult:
        deadline = Deadline(self.timeout)
        while True:
            try:
                with scope.entered():
                    return self.client.prefill(
                        self.name,
                        prompt,
                        self.attention,
                        delivery=Inline(self.kv_dtype, wire_dtype=self.wire_dtype),
                        timeout=deadline.left(),
                    )
            except ResourceExhaustedError as error:
                pause = error.retry_after
                if pause is None or pause >= deadline.left():
                    raise
                if scope.wait_cancelled(pause):
                    raise


def _first(waiting: deque[Future[PrefillResult]]) -> PrefillResult:
    """Takes the first result; an error of any of them ends the wait."""
    while not waiting[0].done():
        under_way = [future for future in waiting if not future.done()]
        wait(under_way, return_when=FIRST_COMPLETED)
        for future in waiting:
            if future.done():
                future.result()
    return waiting.popleft().result()
