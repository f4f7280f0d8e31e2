"""What asking servers has used, and the caps on it."""

import threading
from dataclasses import astuple, dataclass, fields
from typing import Any


class BudgetExceeded(RuntimeError):
    """A cap on requests, tokens or money is reached, and something is still to ask."""


@dataclass
class Usage:
    """What has been asked so far.

    Parameters:
        requests (`int`): Requests started, those asked again after a malformed answer included.
        retries (`int`): Attempts that the client library added to requests which were answered in the end.
        prompt_tokens, completion_tokens (`int`): As reported by the servers.
        unreported (`int`): Answers whose tokens the server did not report, so that they are in no sum.
        cost (`float`): In the currency of the prices, at those that held when it was spent; `0` without prices.
    """

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unreported: int = 0
    cost: float = 0.0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: "Usage") -> "Usage":
        return Usage(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def resume(self, former: "Usage") -> None:
        """Goes on from what former runs have used: raises each count to theirs at least.

        Not added, since one and the same object may have been used in them. So caps hold for what the object itself has
        asked for, and for what former runs and the present one have together.
        """
        for field in fields(self):
            setattr(self, field.name, max(getattr(self, field.name), getattr(former, field.name)))


class Budget:
    """
    Counts into a `usage`, and says when there is no room for another request. Safe for threads.

    Args:
        max_requests, max_tokens (`int`, *optional*), max_cost (`float`, *optional*):
            Caps on the `requests`, prompt and completion tokens, and `cost` of `usage`.
        price_in, price_out (`float`, *optional*):
            Price of a million prompt and completion tokens.

    Raises:
        `ValueError`: a negative number, or a cap on money without prices.
    """

    def __init__(
        self,
        max_requests: int | None = None,
        max_tokens: int | None = None,
        max_cost: float | None = None,
        price_in: float | None = None,
        price_out: float | None = None,
    ):
        self.caps = {"max_requests": max_requests, "max_tokens": max_tokens, "max_cost": max_cost}
        for name, value in (self.caps | {"price_in": price_in, "price_out": price_out}).items():
            if value is not None and not value >= 0:
                raise ValueError(f"`{name}` is {value!r}: it must be at least 0.")
        if max_cost is not None and (price_in is None or price_out is None):
            raise ValueError(
                f"`max_cost` is {max_cost!r} without prices: give `price_in` and `price_out`, each for a million tokens."
            )
        self.price_in = price_in or 0.0
        self.price_out = price_out or 0.0
        self.usage = Usage()
        self._lock = threading.Lock()
        self._started = 0  # unlike `usage.requests`, without those of former runs

    def start(self) -> None:
        """Counts a request that is about to start, or raises `BudgetExceeded`."""
        with self._lock:
            usage = self.usage
            spent = {
                "max_requests": usage.requests,
                "max_tokens": usage.prompt_tokens + usage.completion_tokens,
                "max_cost": usage.cost,
            }
            for name, cap in self.caps.items():
                if cap is None:
                    continue
                if spent[name] >= cap:
                    raise BudgetExceeded(self._said(name))
                if name != "max_requests" and usage.unreported:
                    raise BudgetExceeded(
                        f"`{name}` = {cap} cannot be kept, since the server does not report the tokens it used: cap "
                        "`max_requests` instead."
                    )
            usage.requests += 1
            self._started += 1

    def _said(self, name: str) -> str:
        usage, former = self.usage, self.usage.requests - self._started
        reached = "is reached"
        included = f", of which {former} requests by former runs into the same folder" if former else ""
        if former and not self._started:
            reached, included = "was reached by former runs into the same folder, so that nothing is asked", ""
        return (
            f"`{name}` = {self.caps[name]} {reached}: {usage.requests} requests, {usage.prompt_tokens} prompt and "
            f"{usage.completion_tokens} completion tokens, cost {usage.cost:.6g}{included}. Raise it to go on."
        )

    def count(self, reported: dict[str, Any], retries: int) -> None:
        """Adds what a server reports under `usage` of an answer."""
        prompt, completion = (reported.get(f"{kind}_tokens") for kind in ("prompt", "completion"))
        with self._lock:
            self.usage.unreported += prompt is None and completion is None
            self.usage.retries += retries
            self.usage.prompt_tokens += prompt or 0
            self.usage.completion_tokens += completion or 0
            self.usage.cost += ((prompt or 0) * self.price_in + (completion or 0) * self.price_out) / 1e6
