"""What a `Sink` is told about its engine, and what it finds out by recording the engine's loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from msgspec import structs
from torch import nn

from wsync.adapters.engines.grouping import Groups, fused_groups, given_groups
from wsync.adapters.engines.laying_out import Layouts as Layouts
from wsync.adapters.engines.laying_out import with_layouts
from wsync.adapters.engines.offering import recipe_of
from wsync.adapters.engines.recorder import Recording, record_loader
from wsync.adapters.engines.transforms import DEQUANTISE, check_transforms, plain_recipe, with_transforms
from wsync.adapters.engines.verify import verify_recording
from wsync.api.live import LoadWeights, live_tensors, load_by_name
from wsync.errors import ConfigError, MissingTensorError, UnknownTensorError
from wsync.session.laststep import LastSteps
from wsync.spec.manifest import SinkRankManifest, TensorSpec

Recipes = Mapping[str, str] | Callable[[TensorSpec], str]
Transforms = Mapping[str, str] | Callable[[TensorSpec], str | None]
ScaleGroups = Iterable[Iterable[str]]


class EngineSide:
    """An engine and how its weights are wanted. The arguments are those of `Sink`.

    Raises:
        ConfigError: they do not fit together.
    """

    def __init__(
        self,
        engine_model: Any,
        load_weights: LoadWeights | None,
        recipes: Recipes | None,
        scale_groups: ScaleGroups | None,
        transforms: Transforms | None,
        layouts: Layouts | None,
        allow_missing: Iterable[str],
    ) -> None:
        self.engine = engine_model
        self._tensors = live_tensors(engine_model)
        self._records_itself = hasattr(engine_model, "live_tensors") and hasattr(engine_model, "record")
        if self._records_itself:
            kind = type(engine_model).__name__
            if load_weights is not None:
                raise ConfigError(f"{kind}.record() and load_weights are given: one loader, please")
            if transforms is not None or layouts is not None:
                given = "transforms" if transforms is not None else "layouts"
                raise ConfigError(f"{kind}.record() and {given} are given: one of them has the last steps, please")
        self._load_weights = load_weights or load_by_name(self._tensors)
        self._recipes = recipes if recipes is not None else getattr(engine_model, "recipe_for", None)
        self._groups: Groups | None = None if scale_groups is None else given_groups(scale_groups)
        self._transforms = transforms
        self._layouts = dict(layouts or {})
        self._allow_missing = tuple(allow_missing)

    def record(self, tensors: tuple[TensorSpec, ...], num_threads: int) -> tuple[Recording, LastSteps]:
        """Record the engine's loader against the trainer's name table.

        Args:
            tensors: the name table.
            num_threads: of transforms and layouts.

        Raises:
            ConfigError: or one of its leaves: engine and trainer do not fit together.
        """
        if isinstance(self._recipes, Mapping):
            unknown = sorted(set(self._recipes) - {t.name for t in tensors})
            if unknown:
                raise UnknownTensorError(
                    f"recipes names {unknown[0]!r}, which is no tensor of the trainer's {len(tensors)}"
                )
        if self._records_itself:
            recorded = self.engine.record(tensors, self._recipes or {}, self._allow_missing)
            return recorded.recording, recorded.last_steps
        recording, steps = self._record_transformed(tensors, num_threads)
        return recording, with_layouts(recording, steps, self._layouts, num_threads)

    def _record_transformed(self, tensors: tuple[TensorSpec, ...], num_threads: int) -> tuple[Recording, LastSteps]:
        transforms = self._wanted_transforms(tensors)
        if not transforms:
            recording = self._record_loader(tensors, self._recipes or {})
            return recording, recording.last_steps()
        wire = {t.name: recipe_of(t, self._recipes) for t in tensors}
        check_transforms(transforms, tensors, wire.__getitem__)

        def offered(spec: TensorSpec) -> str:
            return plain_recipe(spec) if transforms.get(spec.name) == DEQUANTISE else wire[spec.name]

        recording = self._record_loader(tensors, offered)
        return with_transforms(recording, tensors, transforms, {n: wire[n] for n in transforms}, num_threads)

    def with_groups(self, manifest: SinkRankManifest, recording: Recording) -> SinkRankManifest:
        """The manifest with the scale groups that were given, or that follow from the engine's layout."""
        groups = self._groups
        if groups is None:
            # A recording that an engine makes itself is asked only where a recipe needs it.
            groups = fused_groups(manifest, lambda idx, element: recording.matrix_at(idx, element))
        return structs.replace(manifest, scale_groups=groups)

    def _wanted_transforms(self, tensors: tuple[TensorSpec, ...]) -> dict[str, str]:
        wanted = self._transforms or {}
        if isinstance(wanted, Mapping):
            return dict(wanted)
        return {t.name: transform for t in tensors if (transform := wanted(t)) is not None}

    def _record_loader(self, tensors: tuple[TensorSpec, ...], recipes: Recipes) -> Recording:
        module = self.engine if isinstance(self.engine, nn.Module) else None
        recording = record_loader(
            self._load_weights,
            tensors,
            self._tensors,
            recipes,
            allow_missing=self._allow_missing,
            module=module,
        )
        if recording.needs_verification:
            verify_recording(recording, self._load_weights, tensors)
        forgotten = sorted(set(recording.coverage.not_loaded) - set(self._allow_missing))
        if forgotten:
            raise MissingTensorError(
                f"the engine has {', '.join(map(repr, forgotten[:5]))}, which no tensor of the trainer fills "
                f"({len(forgotten)} of {len(self._tensors)} live tensors)",
                hint="load the same model on both sides, or name them in allow_missing",
            )
        return recording
