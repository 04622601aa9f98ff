"""Import paths and names of version 0.3, which work until 0.5 and warn with the new ones."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

TYPE_CHECKING = False  # as typing has it, whose import would take most of the time
if TYPE_CHECKING:
    from typing import Any

ALIASES = {  # public modules whose names stay; no warning
    "adapt": "tokenlearner.checkpoints.init_from",
    "convert": "tokenlearner.checkpoints.scenic",
}

MODULES = {  # that were files of version 0.3
    "app": "commands.app.server",
    "app_inputs": "commands.app.uploads",
    "app_look": "commands.app.inference",
    "app_models": "commands.app.models",
    "app_page": "commands.app.page",
    "app_view": "commands.app.view",
    "augment": "data.transforms",
    "bench_config": "commands.bench.config",
    "bench_models": "commands.bench.run",
    "bench_run": "commands.bench.run",
    "bench_table": "commands.bench.table",
    "benchmark": "evaluation.latency",
    "calibrate": "training.calibration",
    "card": "models.hub",
    "catalog": "evaluation.catalog",
    "checks": "utils.validation",
    "cli": "commands.main",
    "clips": "models.video_embed",
    "contest": "commands._comparison",
    "counting": "evaluation.flops",
    "data_options": "data.config",
    "demo": "commands.demo",
    "distill": "training.distillation",
    "engine": "training.distributed",
    "evaluate": "evaluation.accuracy",
    "export": "deploy.exporting",
    "export_table": "commands.export",
    "fashion": "data.fashion_mnist",
    "files": "utils.io",
    "films": "data.video_folder",
    "folders": "data.image_folder",
    "formats": "deploy.formats",
    "framevit": "models.framevit",
    "fuser": "layers.token_fuser",
    "hosts": "models.hosts",
    "hub": "models.hub",
    "insert": "models.insertion",
    "labelled": "data.dataset",
    "listing": "data.image_folder",
    "loader": "data.loader",
    "loop": "training.trainer",
    "machine": "evaluation.hardware",
    "map_inputs": "commands._inputs",
    "map_run": "commands.maps",
    "map_table": "commands.maps",
    "maps": "evaluation.maps",
    "mixer": "models.mixer",
    "modules": "layers.token_learner",
    "moving": "data.moving_photos",
    "narrow": "deploy.quantization",
    "objective": "training.losses",
    "onednn": "layers.onednn",
    "options": "training.config",
    "overlap": "evaluation.map_stats",
    "pictures": "data.tensor_dataset",
    "plan": "evaluation.planning",
    "plan_table": "commands.plan",
    "progress": "commands._console",
    "readers": "data.hub_datasets",
    "recipe": "training.config",
    "recipes": "training.recipes",
    "registry": "models.registry",
    "report": "commands.report.render",
    "report_charts": "commands.report.figures",
    "report_judge": "commands.report.confusion",
    "report_parts": "commands.report.tables",
    "report_read": "commands.report.reader",
    "report_sections": "commands.report.sections",
    "report_tables": "commands.report.tables",
    "report_told": "commands.report.sections",
    "resume": "training.checkpointing",
    "saving": "models.serialization",
    "scenic": "checkpoints.scenic_config",
    "shards": "data.hub_datasets",
    "sheets": "evaluation.map_figures",
    "sized": "commands._models",
    "start": "training.setup",
    "stream": "models.streaming",
    "streamed": "data.iterable",
    "tables": "commands._tables",
    "train": "training.run",
    "transfer": "checkpoints.convert",
    "video": "models.vivit",
    "vit": "models.vit",
    "wrappers": "layers.blocks",
    "zoo": "models.factory",
}

PACKAGES = {  # that were files of version 0.3 under the same name
    "checkpoints": "checkpoints.readers",
    "data": "data.factory",
    "layers": "layers.functional",
}

NAMES = {  # that version 0.3 had in one of these files
    "Asked": "training.checkpointing:StopSignal",
    "AugmentOptions": "data.config:AugmentConfig",
    "Bench": "commands.bench.run:BenchResult",
    "BrokenFile": "data.dataset:UnreadableFile",
    "Candidate": "commands.bench.config:BenchModel",
    "Change": "data.loader:Transform",
    "Contender": "commands._comparison:Candidate",
    "Contest": "commands._comparison:ModelComparison",
    "DataOptions": "data.config:DataConfig",
    "Engine": "training.distributed:Distributed",
    "EvalConfig": "commands.eval:EvalConfig",
    "FILM_EXTENSIONS": "data.video_folder:VIDEO_EXTENSIONS",
    "FileDataset": "data.image_folder:ImageFileDataset",
    "FilePictures": "data.image_folder:ImageFiles",
    "FilmDataset": "data.video_folder:VideoFolderDataset",
    "Intake": "commands._inputs:InputPipeline",
    "HubPictures": "data.hub_datasets:LibraryImages",
    "KINDS": "training.distillation:DISTILL_TYPES",
    "Key": "data.loader:SampleKey",
    "LEARNERS": "layers.token_learner:LEARNERS",
    "LabelledData": "data.dataset:LabeledDataset",
    "Lesson": "training.teacher:TeacherCache",
    "Loop": "training.trainer:Trainer",
    "MapStats": "evaluation.map_stats:AttentionStats",
    "ModelOptions": "training.config:ModelConfig",
    "ModelsConfig": "commands.models:ModelsConfig",
    "NOT_JUDGED": "commands._runs:TRAINING_ONLY",
    "OF_THE_SET": "commands._runs:DATASET_OPTIONS",
    "OPENED": "data.image_folder:MAX_OPENED",
    "OfPositions": "layers.blocks:PositionArgs",
    "OptimOptions": "training.config:OptimConfig",
    "PictureFiles": "data.image_folder:ImagePaths",
    "PictureSource": "data.image_folder:ImageSource",
    "RunOptions": "training.config:RunConfig",
    "SHUFFLED": "data.iterable:SHUFFLE_BUFFER",
    "Seen": "training.distillation:BlockOutputs",
    "SheetRow": "evaluation.map_figures:FigureRow",
    "Spread": "evaluation.latency:Timing",
    "Start": "training.setup:TrainingSetup",
    "Stopped": "training.checkpointing:TrainingInterrupted",
    "TRIES": "data.loader:MAX_TRIES",
    "TeachingOptions": "training.config:DistillConfig",
    "TorchPictures": "data.hub_datasets:LibraryImages",
    "UnplacedBlock": "layers.blocks:PositionFreeBlock",
    "Wanted": "data.config:DataConfig",
    "_MLP": "torch.nn:Sequential",
    "against_host": "commands._comparison:compare_with_host",
    "as_seen": "commands._comparison:denormalized",
    "check_grid_remains": "models.features:check_has_grid",
    "check_place": "training.checkpointing:check_run_folder",
    "checked": "data.iterable:check_stream",
    "clear_remains": "training.checkpointing:remove_temporary_files",
    "conclude": "evaluation.accuracy:mean_metrics",
    "count_macs": "evaluation.flops:count_macs",
    "draw": "utils.random:derive_seed",
    "draw_held_out": "commands._comparison:held_out_images",
    "eval_options": "commands.eval:eval_options",
    "first_tensor": "models.outputs:first_tensor",
    "flat_tree": "checkpoints.flax_msgpack:flat_tree",
    "frames": "layers.functional:leading_dims",
    "free_folder": "utils.io:unique_path",
    "has_classes": "models.outputs:outputs_logits",
    "how_built": "models.serialization:get_build_args",
    "insertion": "models.insertion:get_insertion",
    "intake_of": "commands._inputs:input_pipeline",
    "is_film": "commands._inputs:is_video",
    "is_seen": "utils.processors:is_main_process",
    "judged_as": "commands._runs:run_options",
    "labelled_files": "data.image_folder:list_labeled_files",
    "laid_over": "evaluation.map_figures:overlay",
    "learner_form": "checkpoints.scenic_config:describe_learner",
    "listed": "utils.validation:shortened",
    "listening": "training.checkpointing:handle_signals",
    "load_candidates": "commands.bench.run:load_bench_models",
    "load_fashion": "data.fashion_mnist:load_fashion_mnist",
    "load_fashion_small": "data.fashion_mnist:load_fashion_mnist_small",
    "load_films": "data.video_folder:load_video_folder",
    "load_moving": "data.moving_photos:load_moving_photos",
    "load_reader": "data.hub_datasets:load_library_dataset",
    "look": "models.hosts:find_host",
    "make_average": "training.optim:make_average",
    "make_optimizer": "training.optim:make_optimizer",
    "make_schedule": "training.optim:make_schedule",
    "look_at": "commands.maps:compute_maps",
    "markdown": "evaluation.catalog:catalog_markdown",
    "mixing": "data.transforms:mixup_transform",
    "mode": "utils.modules:training_mode",
    "moment_rows": "commands.maps:time_step_rows",
    "narrow": "deploy.quantization:quantize",
    "output_of": "models.outputs:output_tensor",
    "parse_candidate": "commands.bench.config:parse_bench_model",
    "parts": "layers.functional:chunks",
    "pick_device": "utils.modules:pick_device",
    "pictures_at_once": "evaluation.accuracy:eval_batch_size",
    "plain_batches": "data.loader:eval_batches",
    "plain_text": "evaluation.catalog:catalog_text",
    "read_model": "models.hub:load_model",
    "random_states": "utils.random:random_states",
    "sampled_frames": "models.video_embed:sample_frames",
    "seconds_in_turn": "evaluation.latency:time_models",
    "seeded": "utils.random:fixed_seed",
    "set_random_states": "utils.random:set_random_states",
    "set_whole_state": "training.distributed:set_full_state",
    "some": "utils.validation:shortened",
    "square": "layers.functional:square_grid",
    "stats_numbers": "commands.maps:stats_json",
    "summary": "models.outputs:summarize_tokens",
    "tally": "evaluation.accuracy:sum_metrics",
    "telling": "training.checkpointing:explain_write_errors",
    "times_in_turn": "evaluation.latency:time_interleaved",
    "train_options": "commands.train:train_options",
    "training_change": "data.transforms:train_transform",
    "twin": "utils.modules:clone_structure",
    "unexplained": "training.distillation:unexplained_variance",
    "upload_model": "models.hub:push_to_hub",
    "watch": "training.distillation:forward_with_features",
    "whole_state": "training.distributed:full_state",
    "widen": "layers.functional:upcast",
    "write_contest": "commands._comparison:write_comparison",
    "write_flax": "checkpoints.flax_msgpack:write_flax",
    "write_sheet": "evaluation.map_figures:write_figure",
    "write_model": "models.hub:save_model",
    "written_whole": "utils.io:atomic_write",
}


def install() -> None:
    """Lets Python import what `ALIASES` and `MODULES` name."""
    if not any(isinstance(finder, _MovedFinder) for finder in sys.meta_path):
        sys.meta_path.append(_MovedFinder())


def alias(name: str) -> Any:
    """Returns a public module that has kept its name; the fallback of `tokenlearner`."""
    if name not in ALIASES:
        raise AttributeError(f"module 'tokenlearner' has no attribute {name!r}")
    return import_module(ALIASES[name])


def moved_names(package: str) -> Callable[[str], Any]:
    """Returns the fallback of a package that was a file of version 0.3."""

    def get(name: str) -> Any:
        old = f"tokenlearner.{package}"
        value, new = _resolve(PACKAGES[package], name, old)
        _warn(f"{old}.{name}", new)
        return value

    return get


def _resolve(module: str, name: str, old: str) -> tuple[Any, str]:
    """Returns the value of a name that `old` had in version 0.3, and its new path."""
    home, _, new = NAMES.get(name, f"{module}:{name}").partition(":")
    owner = import_module(home if home.startswith("torch") else f"tokenlearner.{home}")
    if not hasattr(owner, new):
        raise AttributeError(f"module {old!r} has no attribute {name!r}")
    return getattr(owner, new), f"{owner.__name__}.{new}"


def _warn(old: str, new: str) -> None:
    message = f"{old} has moved to {new}; the old path goes in version 0.5"
    warnings.warn(message, DeprecationWarning, stacklevel=3)


class _MovedFinder:
    """Finds and loads `tokenlearner.NAME` for files of version 0.3 that do not exist any more."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, module = name.partition(".")
        loader: Any = self
        is_moved = package == "tokenlearner" and module in (*ALIASES, *MODULES)
        return ModuleSpec(name, loader) if is_moved else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _MovedModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__.partition(".")[2]
        if name in ALIASES:
            sys.modules[module.__name__] = import_module(ALIASES[name])
            return
        import_module(f"tokenlearner.{MODULES[name]}")  # it may register models
        _warn(module.__name__, f"tokenlearner.{MODULES[name]}")


class _MovedModule(ModuleType):
    """Stands for a file of version 0.3 and has its names.

    Seven of the files had the name of the public function in them. Python sets an imported file as
    an attribute of its package, in place of the function, so this can be called like the function.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _resolve(MODULES[self.__name__.partition(".")[2]], name, self.__name__)[0]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)
