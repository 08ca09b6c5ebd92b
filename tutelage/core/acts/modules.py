"""What is trained: freezing, freeing and beginning anew, by patterns over parameter names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tutelage.base.errors import UserError
from tutelage.core import randomness, shape
from tutelage.core.acts.trial import Trial

if TYPE_CHECKING:
    from tutelage.core.stage import Run


def matched(run: Run, patterns: list[str], place: str) -> set[str]:
    """Names of the model's parameters that patterns name."""
    own = {name for name, _ in run.engine.model.named_parameters()}
    found = set(run.engine.anatomy.match(patterns)) & own
    if not found:
        raise UserError(f"{place}: no parameter matches {', '.join(patterns)} (a name is for example {min(own)})")
    return found


def _plain(run: Run, patterns: list[str], place: str) -> set[str]:
    """The same; UserError where one of them is held in four bits."""
    found = matched(run, patterns, place)
    packed = sorted(name for name in found if not run.engine.model.get_parameter(name).is_floating_point())
    if packed:
        raise UserError(f"{place}: {packed[0]} is held in four bits, which are not trained")
    return found


def _froze(run: Run, trial: Trial, action: Any, place: str) -> None:
    left = trial.trained - matched(run, action.modules, place)
    if not left:
        raise UserError(f"{place}: nothing would be left to train")
    trial.trained = left


def _unfroze(run: Run, trial: Trial, action: Any, place: str) -> None:
    asked = _plain(run, action.modules, place)
    inside, parts = set(), set()
    for layer, (wrapper, method, _) in run.wrapped.items():
        names = [name for name, _ in wrapper.named_parameters()]
        inside |= {f"{layer}.{name}" for name in names}
        parts |= {f"{layer}.{name}" for name in names if method.trains(name)}
    wrapping = run.methods.having("wrap")
    if (asked if any(method.freezes for method in wrapping) else asked & inside) - parts:
        raise UserError(f"{place}: under a wrapper ({wrapping[0].name()}) only its own parts are trained")
    trial.trained |= asked


def _module_effect(run: Run, action: Any) -> dict[str, Any]:
    names, active = matched(run, action.modules, action.do), set(run.engine.params)
    moved = sorted(names & active if action.do == "freeze" else names - active)
    count = sum(run.engine.model.get_parameter(name).numel() for name in moved)
    back = [{"do": "unfreeze" if action.do == "freeze" else "freeze", "modules": moved}] if moved else []
    what = {
        "what": "parameters trained",
        "was": len(active),
        "now": len(active) + (len(moved) if action.do != "freeze" else -len(moved)),
    }
    return {"changes": [what], "numbers": count, "undo": back}


def _freeze(run: Run, action: Any) -> None:
    names = matched(run, action.modules, action.do)
    active = set(run.engine.params)
    shape.retrain(run, active - names if action.do == "freeze" else active | names)


def _resettable(run: Run, trial: Trial, action: Any, place: str) -> None:
    _plain(run, action.modules, place)
    if run.wrapped:
        raise UserError(
            f"{place}: a wrapped model ({run.methods.having('wrap')[0].name()}) has no fresh weights to go back to"
        )
    trial.clock.tick += 1


def _reset_effect(run: Run, action: Any) -> dict[str, Any]:
    names = matched(run, action.modules, action.do)
    count = sum(run.engine.model.get_parameter(name).numel() for name in names)
    return {"changes": [{"what": f"{len(names)} parameters", "was": "trained", "now": "fresh"}], "numbers": count}


def _reset(run: Run, action: Any) -> None:
    names = matched(run, action.modules, action.do)
    randomness.reseed(run.view.seed_of("reset"))
    config = run.engine.model.config.to_dict()
    fresh = run.modality.model(None, config, processor=run.processor, length=run.node.stage.length)
    shape.overwrite(run, {name: p.detach() for name, p in fresh.named_parameters() if name in names})
    run.next_tick()


ACTS = {
    "freeze": (_froze, _module_effect, _freeze),
    "unfreeze": (_unfroze, _module_effect, _freeze),
    "reset": (_resettable, _reset_effect, _reset),
}
