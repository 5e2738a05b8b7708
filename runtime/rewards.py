"""Reward functions, and what is wrong with what they return: named with the function and the completion.

A reward function is called as TRL calls it, with lists of prompts and completions and the data's other columns, and
returns a number for each completion. None is TRL's way to say that a function does not judge a completion; a completion
that nobody judges teaches nothing.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from trl.trainer.utils import is_async_callable

logger = logging.getLogger(__name__)

SHOWN = 80
"""Characters of a prompt or a completion in a message."""

ON_ERROR = ("raise", "skip")


class RewardError(ValueError):
    """A reward function raised, or returned something that is no reward."""


def checked(function: Callable[..., Any], name: str, on_error: str) -> Callable[..., Any]:
    """The reward function, whose mistakes raise :class:`RewardError` or cost the completions that they are about.

    Args:
        function: as TRL takes it, synchronous or not.
        name: what it is called in messages.
        on_error: "raise"; or "skip": completions without a usable reward get None, with a warning.
    """
    if is_async_callable(function):

        @functools.wraps(function)
        async def judge_later(**arguments: Any) -> list[float | None]:
            try:
                rewards = await function(**arguments)
            except Exception as error:  # noqa: BLE001  a user's function may raise anything
                return _failed(name, error, arguments, on_error, None)
            return _usable(name, rewards, arguments, on_error)

        return judge_later

    @functools.wraps(function)
    def judge(**arguments: Any) -> list[float | None]:
        try:
            rewards = function(**arguments)
        except Exception as error:  # noqa: BLE001
            return _failed(name, error, arguments, on_error, function)
        return _usable(name, rewards, arguments, on_error)

    return judge


def check_judged(names: Sequence[str], judged: Sequence[bool], arguments: dict[str, Any], on_error: str) -> None:
    """Report the first completion that no reward function has judged.

    Args:
        names: of the functions.
        judged: for each completion, whether any of them returned a number.
        arguments: ``prompts`` and ``completions``.
    """
    if all(judged):
        return
    first = list(judged).index(False)
    who = names[0] if len(names) == 1 else "every one of " + ", ".join(names)
    said = f"reward function {who} returned None for {_sample(arguments, first)}"
    if on_error == "raise":
        raise RewardError(f"{said}: nothing says how good it is. {_HOW_TO_GO_ON}")
    logger.warning("%s; it is left out (%d of %d are)", said, list(judged).count(False), len(judged))


_HOW_TO_GO_ON = "reward_errors='skip' leaves such completions out and goes on"


def _usable(name: str, rewards: Any, arguments: dict[str, Any], on_error: str) -> list[float | None]:
    count = len(arguments["prompts"])
    try:
        values = list(rewards)
    except TypeError:
        raise RewardError(
            f"reward function {name} returned {type(rewards).__name__}, not a list of {count} rewards"
        ) from None
    if len(values) != count:  # which of them is whose, nobody knows: there is nothing to go on with
        raise RewardError(f"reward function {name} returned {len(values)} rewards for {count} completions")
    usable: list[float | None] = []
    wrong: list[tuple[int, str]] = []
    for i, reward in enumerate(values):
        number, problem = _number(reward)
        usable.append(number)
        if problem:
            wrong.append((i, problem))
    if wrong:
        _report(name, wrong, arguments, on_error)
    return usable


def _number(reward: Any) -> tuple[float | None, str | None]:
    if reward is None:
        return None, None
    try:
        number = float(reward)
    except (TypeError, ValueError, RuntimeError):
        return None, f"{reward!r}, which is no number,"
    return (number, None) if math.isfinite(number) else (None, str(number))


def _report(name: str, wrong: list[tuple[int, str]], arguments: dict[str, Any], on_error: str) -> None:
    first, what = wrong[0]
    said = f"reward function {name} returned {what} for {_sample(arguments, first)}"
    if on_error == "raise":
        raise RewardError(f"{said}. {_HOW_TO_GO_ON}")
    logger.warning("%s; it does not judge it (%d of %d)", said, len(wrong), len(arguments["prompts"]))


def _failed(
    name: str, error: Exception, arguments: dict[str, Any], on_error: str, function: Callable[..., Any] | None
) -> list[float | None]:
    """After a function raised: ask about one completion at a time, in order to know which it was."""
    count = len(arguments["prompts"])
    rewards: list[float | None] = [None] * count
    wrong: list[tuple[int, Exception]] = []
    for i in range(count if function is not None else 0):
        one = {k: [v[i]] if isinstance(v, list) and len(v) == count else v for k, v in arguments.items()}
        try:
            (rewards[i],) = _usable(name, function(**one), one, "skip")  # type: ignore[misc]
        except Exception as again:  # noqa: BLE001
            wrong.append((i, again))
            if on_error == "raise":
                break
    where = f" for {_sample(arguments, wrong[0][0])}" if wrong else f" for a batch of {count} completions"
    cause = wrong[0][1] if wrong else error
    said = f"reward function {name} raised {type(cause).__name__}: {cause}{where}"
    if on_error == "raise":
        raise RewardError(f"{said}. {_HOW_TO_GO_ON}") from error
    logger.warning("%s; it does not judge it (%d of %d)", said, len(wrong) or count, count)
    return rewards


def _sample(arguments: dict[str, Any], index: int) -> str:
    prompt, completion = (_text(arguments[name][index]) for name in ("prompts", "completions"))
    return f"sample {index} of {len(arguments['prompts'])} (prompt {prompt}, completion {completion})"


def _text(messages: Any) -> str:
    """The end of a prompt or the beginning of a completion, chats by their last message."""
    text = messages[-1].get("content") if isinstance(messages, list) and messages else messages
    if isinstance(text, list):  # in parts, of which an image is shown as what it is
        text = "".join(part.get("text") or f"<{part.get('type')}>" for part in text)
    text = str(text)
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}…")
