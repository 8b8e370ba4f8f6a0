"""One answer on all ranks: hook failures and non-finite gradients are agreed on once a step, before the optimiser.

A hook that raises on one rank only would leave the others waiting in the next collective. So on several ranks the
exception is kept, the step goes on with the hook's fallback, and at the agreement point every rank raises it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trl_ext.engine.unmodified import Unmodified
from trl_ext.engine.watchdog import watched
from trl_ext.errors import NonFiniteError, OnAllRanksError, PluginError
from trl_ext.hookspecs import HOOKS
from trl_ext.own_passes import wait_for_readers
from trl_ext.plugins.plugin_set import PluginSet

logger = logging.getLogger(__name__)
T = TypeVar("T")


class AgreedError(PluginError):
    """A failure that every rank knows of and raises now; it passes through the hook that met it."""


class Guard:
    """Runs hooks for a trainer, with one method for each kind, and turns a failure into one error on every rank.

    Args:
        plugins: the active plugins.
        device: where the agreement's flags live.
        world_size: number of ranks.
        step: gives the number of optimiser steps already done.
    """

    named: Callable[[str], AbstractContextManager[Any]] = nullcontext
    """Gives a range of a profiler its name; a profiled run replaces it on its guard."""

    def __init__(self, plugins: PluginSet, device: torch.device, world_size: int, step: Callable[[], int]) -> None:
        self.plugins = plugins
        self.device = device
        self.world_size = world_size
        self.step = step
        self.last_touched: str | None = None
        self._failure: PluginError | None = None
        self._settled = True
        """Whether nothing of a plugin has run since the ranks last agreed; the same on all ranks, outside of hooks."""
        self._silenced: set[tuple[str, str]] = set()
        self._origin = {p.name: str(p) for p in plugins}
        self._watched = watched(world_size)

    def run(
        self,
        hook: str,
        plugin: str,
        call: Callable[..., T],
        fallback: T,
        check: Callable[[T], None] | None = None,
        always: bool = False,
        **arguments: Any,
    ) -> T:
        """Call something of one plugin. A failure raises at once on one rank, and at the next `agree` on several.

        Args:
            hook: the hook, or whatever else of the plugin is called, for messages.
            plugin: the plugin's name.
            call: what to call.
            fallback: the result where it fails, with which the step goes on until the ranks agree.
            check: raises on a wrong result, which counts as the plugin's failure.
            always: call it after a failure too, as what restores something has to be.
            **arguments: what to call it with.

        Raises:
            PluginError: naming plugin, distribution, hook and step.
        """
        if self._failure is not None and not always:
            return fallback
        if hook in HOOKS and HOOKS[hook].touches_update:
            self.last_touched = f"{plugin}.{hook}"
        unmodified = Unmodified(arguments)
        wait_for_readers()  # it may write to the weights
        try:
            place = f"hook '{hook}' of plugin {self._origin[plugin]} at step {self.step() + 1}"
            with self._watched(place), self.named(f"{plugin}.{hook}"):
                result = call(**arguments)
            unmodified.check()
            if check is not None:
                check(result)
            return result
        except AgreedError:
            raise
        except OnAllRanksError as error:
            raise AgreedError(str(self.failure(hook, plugin, str(error)))) from error
        except Exception as error:
            failure = self.failure(hook, plugin, f"{type(error).__name__}: {error}")
            if self.world_size == 1:
                raise failure from error
            logger.exception(str(failure))
            failure.__cause__ = error
            self._failure = self._failure or failure
            return fallback
        finally:
            self._settled = False  # also where the ranks have agreed inside of it

    def run_all(self, hook: str, **arguments: Any) -> None:
        """Call every implementation of a hook of the kind *all* or *in place*. Collective."""
        check = _nothing_returned if HOOKS[hook].kind == "in place" else None
        for plugin, call in self._in_turn(hook):
            self.run(hook, plugin, call, None, check, **arguments)

    def chain(self, hook: str, argument: str, value: T, check: Callable[[T], None], **arguments: Any) -> T:
        """Call every implementation in order, each on the result of the one before. Collective.

        Args:
            hook: the hook.
            argument: the name of its argument that is handed on.
            value: what the first implementation receives.
            check: raises on a wrong result.
            **arguments: the hook's other arguments.
        """
        for plugin, call in self._in_turn(hook):
            given: dict[str, Any] = {argument: value, **arguments}
            value = self.run(hook, plugin, call, value, check, **given)
        return value

    def _in_turn(self, hook: str) -> Iterator[tuple[str, Callable[..., Any]]]:
        """A hook's implementations. The ranks agree before each: one that failed would be missed in its collectives.

        Before the first they do so only where another hook of the same step may have failed.
        """
        for i, call in enumerate(self.plugins.calls(hook)):
            if i or HOOKS[hook].touches_update:
                self.settle()
            yield call

    def exclusive(self, hook: str, fallback: T, *, check: Callable[[T], None] | None = None, **arguments: Any) -> T:
        """Give the result of the hook's owner; `fallback` where it has none, or where the owner fails.

        Args:
            hook: the hook.
            fallback: what stands in for the owner's result.
            check: raises on a wrong result.
            **arguments: the hook's arguments.
        """
        for plugin, call in self.plugins.calls(hook):
            return self.run(hook, plugin, call, fallback, check, **arguments)
        return fallback

    def sum(self, hook: str, *, check: Callable[[Mapping[str, T]], None], **arguments: Any) -> dict[str, T]:
        """Give the named terms of all plugins, to be added up, under `<plugin>/<term>`.

        Args:
            hook: the hook.
            check: raises on a wrong result of one plugin.
            **arguments: the hook's arguments.
        """
        terms: dict[str, T] = {}
        for plugin, call in self.plugins.calls(hook):
            given: Mapping[str, T] = self.run(hook, plugin, call, {}, check, **arguments)
            terms |= {f"{plugin}/{name}": term for name, term in given.items()}
        return terms

    def collect(self, hook: str, **arguments: Any) -> dict[str, float]:
        """Gather the named numbers of all plugins under `<plugin>/<name>`.

        They are for the log alone, so a plugin that raises on any rank is logged and switched off on all: it must not
        end the training. Every rank gets the numbers of rank 0, so that all choose the same best checkpoint by them.
        Collective if any plugin has the hook.
        """
        collected: dict[str, float] = {}
        failed: set[str] = set()
        calls = [(plugin, call) for plugin, call in self.plugins.calls(hook) if (hook, plugin) not in self._silenced]
        for plugin, call in calls:
            try:
                with self._watched(f"hook '{hook}' of plugin {self._origin[plugin]}"), self.named(f"{plugin}.{hook}"):
                    given = dict(call(**arguments))
            except Exception:
                failed.add(plugin)
                logger.exception("%s; it is switched off from here on", self.failure(hook, plugin, "it raised"))
                continue
            for key, value in given.items():
                if (number := self._number(hook, plugin, key, value)) is not None:
                    collected[f"{plugin}/{key}"] = number
        if not calls:
            return collected
        ranks = self.gather((collected, failed))
        self._silenced |= {(hook, plugin) for _, failed in ranks for plugin in failed}
        return self._of_rank_zero(hook, [numbers for numbers, _ in ranks])

    def _number(self, hook: str, plugin: str, key: str, value: Any) -> float | None:
        """One of the numbers that `collect` gathers; None for what is none, which is said once."""
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            if (hook, f"{plugin}/{key}") not in self._silenced:
                self._silenced.add((hook, f"{plugin}/{key}"))
                reason = f"its {key!r} is no number ({type(error).__name__}: {error}); the others are logged"
                logger.warning("%s", self.failure(hook, plugin, reason))
            return None

    def gather(self, value: T) -> list[T]:
        """Every rank's object, on every rank. Collective."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            with self._watched("an exchange of the ranks"):
                dist.all_gather_object(values, value)
        return values

    def failure(self, hook: str, plugin: str, reason: str) -> PluginError:
        """The error for a plugin's fault, with all that is needed to find it."""
        return PluginError(f"plugin {self._origin[plugin]} failed in hook '{hook}' at step {self.step() + 1}: {reason}")

    def agree(self, flag: bool = False) -> bool:
        """Whether `flag` is set on any rank; raises on every rank if a hook failed on any. Collective.

        It comes before every collective that is offered to hooks, and after each hook that may use one: so the first
        collective that a failed rank is missed in is an agreement, where it arrives.
        """
        return flag if self.world_size == 1 else self._agree(torch.tensor(flag, device=self.device))

    def settle(self) -> None:
        """`agree`, unless no hook has run since the ranks last agreed. Collective; never called inside of a hook."""
        if not self._settled:
            self.agree()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum over ranks of (n,) float values; raises on every rank if a hook failed on any. Collective.

        It is an agreement for the price of a sum that is taken anyway.
        """
        if self.world_size == 1:
            return values
        sums = torch.cat([values, values.new_tensor([self._failure is not None])])
        with self._watched("a sum over the ranks"):
            dist.all_reduce(sums)
            any_failed = bool(sums[-1])
        if any_failed:
            self._raise_everywhere()
        self._settled = True
        return sums[:-1]

    def agree_finite(self, grad_norm: Tensor | float, loss_is_finite: Tensor | bool) -> bool:
        """Whether gradient and loss are finite on all ranks; raises if a hook failed on any. Collective.

        Args:
            grad_norm: () the global gradient norm before clipping.
            loss_is_finite: () bool, of this rank's micro-steps before the agreement.
        """
        norm = torch.as_tensor(grad_norm, device=self.device)
        infinite = ~(torch.isfinite(norm) & loss_is_finite)
        return not (bool(infinite) if self.world_size == 1 else self._agree(infinite))

    def non_finite(self, skippable: bool) -> NonFiniteError:
        """The error to raise for a NaN or infinite gradient or loss; `skippable` says whether steps can be left out."""
        last = self.last_touched
        return NonFiniteError(
            f"NaN or infinite loss or gradient at step {self.step() + 1}, found before the optimiser's step; "
            + (f"the last hook that touched it: {last}. " if last else "no hook touched it. ")
            + ("Set nonfinite='skip' to leave such steps out, on all ranks alike." if skippable else "")
        )

    def _agree(self, flag: Tensor) -> bool:
        """Reduce (failed, flag) over ranks, () bool; raise on failed, return flag."""
        failed = torch.tensor(self._failure is not None, device=self.device)
        flags = torch.stack([failed, flag.to(torch.bool)]).to(torch.int32)
        with self._watched("an agreement of the ranks"):
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            any_failed, any_flag = flags.tolist()
        if any_failed:
            self._raise_everywhere()
        self._settled = True
        return bool(any_flag)

    def _raise_everywhere(self) -> None:
        messages = self.gather(None if self._failure is None else str(self._failure))
        rank, message = next((r, m) for r, m in enumerate(messages) if m is not None)
        raise AgreedError(f"{message} [on rank {rank} of {self.world_size}]") from self._failure

    def _of_rank_zero(self, hook: str, ranks: list[dict[str, float]]) -> dict[str, float]:
        """The numbers of rank 0; what differs elsewhere is warned of, once."""
        for name in ranks[0]:
            shown = [str(other.get(name, "nothing")) for other in ranks]
            if len(set(shown)) > 1 and (hook, name) not in self._silenced:
                self._silenced.add((hook, name))
                text = "hook '%s' gives ranks different numbers '%s' (%s); rank 0's is logged: reduce it in the hook"
                logger.warning(text, hook, name, ", ".join(shown))
        return ranks[0]


def _nothing_returned(result: Any) -> None:
    if result is not None:
        kind = type(result).__name__
        raise TypeError(f"returned a {kind}, which would be ignored; edit the argument in place and return None")
