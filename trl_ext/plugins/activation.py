"""From the names and instances that a run asks for to a checked, ordered set of plugins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trl_ext.errors import ConfigurationError
from trl_ext.hookspecs import HOOKS
from trl_ext.options import check_options
from trl_ext.plugins.coercion import build_options, check_option_types
from trl_ext.plugins.declarations import read_declarations
from trl_ext.plugins.discovery import find_distribution, load_plugin, range_error
from trl_ext.plugins.implementations import marked_hooks
from trl_ext.plugins.plugin_set import ActivePlugin, PluginSet, class_of
from trl_ext.plugins.relations import refuse_relations
from trl_ext.plugins.written_options import line_of, resolved_options
from trl_ext.records import TrainerKind
from trl_ext.specs import config_line, is_name, parse_specs, registered_name


def activate(specs: Any, instances: Sequence[Any] = (), *, trainer: TrainerKind) -> PluginSet:
    """Load, configure and check the plugins of a run: those of `specs` in order, then `instances` in order.

    Args:
        specs: What `parse_specs` accepts.
        instances: Plugins made by the caller.
        trainer: The trainer that will run them.

    Raises:
        ConfigurationError: Anything that would keep the run from doing what was asked; the message names the plugin,
            its distribution and the line to change.
    """
    plugins = [from_spec(spec) for spec in parse_specs(specs)]
    for instance in instances:
        plugins.append(_from_instance(instance, plugins))
    for plugin in plugins:
        _refuse_other_trainer(plugin, trainer)
    refuse_relations(plugins)  # before two owners of a hook are refused, since a declared conflict gives advice
    return PluginSet(plugins)


def check_plugin(name: str) -> None:
    """Check all of an installed plugin that does not depend on a run: import, versions, options, declarations, hooks.

    Raises:
        ConfigurationError: A run with this plugin would be refused.
    """
    plugin_class, info = load_plugin(name)
    line = config_line({"name": name})
    check_option_types(plugin_class, str(info))
    bare: Any = object.__new__(plugin_class)  # hooks are the class's; options may be required or need this run's data
    declared = read_declarations(bare, name, str(info), line)
    PluginSet([ActivePlugin(name, bare, info.distribution, info.version, {}, "", declared, line)])


def from_spec(spec: dict[str, Any]) -> ActivePlugin:
    """Load and configure one plugin; `spec` is one of those that `parse_specs` gives.

    Raises:
        ConfigurationError: it is not installed, or refuses its options.
    """
    plugin_class, info = load_plugin(spec["name"])
    line = line_of(plugin_class, spec)
    options = build_options(plugin_class, spec, str(info))
    try:
        instance = plugin_class(**options)
    except (ImportError, TypeError, ValueError) as error:
        raise ConfigurationError(f"plugin {info} refuses its options: {error}. Change {line}") from error
    return ActivePlugin(
        name=registered_name(spec),
        instance=instance,
        distribution=info.distribution,
        version=info.version,
        options=resolved_options(instance),
        citation=getattr(plugin_class, "citation", ""),
        declared=read_declarations(instance, info.name, str(info), line),
        line=line,
    )


def _refuse_other_trainer(plugin: ActivePlugin, trainer: str) -> None:
    """Refuse a plugin that declares itself, or shows by its hooks, to be for another trainer."""
    if trainer not in plugin.declared.trainers:
        raise ConfigurationError(
            f"plugin {plugin} is for the trainers {', '.join(plugin.declared.trainers)}, and this is {trainer}. "
            f"Remove {plugin.line}"
        )
    acting = [name for name in marked_hooks(plugin.instance) if not HOOKS[name].bystander]
    if acting and not any(trainer in HOOKS[name].trainers for name in acting):
        raise ConfigurationError(
            f"plugin {plugin} acts only through {', '.join(acting)}, which {trainer} never calls. Remove {plugin.line}"
        )


def _from_instance(instance: Any, before: Sequence[ActivePlugin]) -> ActivePlugin:
    line = f"plugins=[{type(instance).__name__}(...)]"
    if isinstance(instance, type):
        raise ConfigurationError(
            f"plugins=[{instance.__name__}] is a class; make an instance: plugins=[{instance.__name__}(...)]"
        )
    if isinstance(instance, str | list | tuple | dict | set) or instance is None:
        raise ConfigurationError(
            f"plugins=[{instance!r}] of a trainer takes instances; names go into its config: SFTConfig(plugins=[...])"
        )
    if any(plugin.instance is instance for plugin in before):
        raise ConfigurationError(f"{line}: the same instance {instance!r} is given twice; make one for each place")
    if misfit := range_error(getattr(instance, "requires_api", None), getattr(instance, "requires_trl", None)):
        raise ConfigurationError(f"{line}: {class_of(instance)} {misfit}")
    try:
        check_options(instance)
    except ValueError as error:
        raise ConfigurationError(f"{line}: {class_of(instance)} refuses its options: {error}") from error
    info = find_distribution(type(instance))
    own_name = info.name if info else type(instance).__name__
    label = getattr(instance, "label", None)
    if label and not is_name(label):
        raise ConfigurationError(
            f"{line}: label={label!r} is not a name (letters, digits, '_', '-', '.'), and names the folder of its state"
        )
    name = label or own_name
    if any(plugin.name == name for plugin in before):
        raise ConfigurationError(
            f"{line}: a plugin named {name!r} is already active. Take one of them out; or, of a plugin that can run "
            "beside another of its kind, set a `label` on the instance"
        )
    return ActivePlugin(
        name=name,
        instance=instance,
        distribution=info.distribution if info else None,
        version=info.version if info else None,
        options=resolved_options(instance),
        citation=getattr(instance, "citation", ""),
        declared=read_declarations(instance, own_name, str(info or f"{name!r} ({class_of(instance)})"), line),
        line=line,
    )
