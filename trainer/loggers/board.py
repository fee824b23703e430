"""What TensorBoard is told beside scalars: layout, config, hyperparameters, histograms, as its protobufs."""

import json
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

CHARTS = {
    "learning": {
        "loss: training against evaluation": ["loss/total", "eval/loss"],
        "evaluation: metrics": ["eval/(?!loss$).+"],
    },
    "gradient": {
        "norm": ["gradient/norm"],
        "clip factor": ["gradient/clip_factor"],
        "windows skipped, values not finite": ["gradient/(skips|nonfinite)"],
        "norm by parameter": ["gradient_norm/.+"],
        "noise scale, in rows": ["gradient/noise_scale"],
        "terms: norms": ["terms/.+/norm"],
        "terms: cosines": ["terms/.+/cosine"],
        "sources: norms": ["sources/.+/norm"],
        "sources: cosines": ["sources/.+/cosine"],
    },
    "step": {
        "learning rate": ["optimizer/lr"],
        "change of the parameters over their norm": ["optimizer/update_ratio"],
        "the same by parameter": ["update_ratio/.+"],
    },
    "cost": {
        "rows per second": ["time/rows_per_second"],
        "memory in MiB": ["memory/.+"],
    },
}
"""The custom charts: by category and title, the patterns of the tags in them."""
OPTIONAL = (
    "gradient/norm", "gradient/clip_factor", "gradient_norm/", "gradient/noise_scale", "terms/", "sources/",
    "optimizer/update_ratio", "update_ratio/",
)  # fmt: skip
"""How the tags begin that not every run has."""

# What a config says about a run's records rather than about what it learns.
_NOT_LEARNING = {
    "recipe", "description", "run", "resume", "init", "trust", "device", "loggers", "checkpoint", "metrics", "best",
    "evaluation",
}  # fmt: skip


def heads(new_event: Any, begin: int, config: dict[str, Any]) -> list[Any]:
    """What a file begins with: version, start, the config as text and as hyperparameters."""
    from tensorboard.compat.proto.event_pb2 import SessionLog

    start = new_event(step=begin, session_log=SessionLog(status=SessionLog.START))
    found = [new_event(file_version="brain.Event:2"), start]
    if config:
        found += [text(new_event, begin, "config", f"```yaml\n{_yaml(config)}```"), _session_start(new_event, config)]
    return found


def session_end(new_event: Any, succeeded: bool) -> Any:
    """The run's end, for the HPARAMS tab: its metrics there are the last values of the scalars."""
    from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

    status = api_pb2.STATUS_SUCCESS if succeeded else api_pb2.STATUS_FAILURE
    end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
    data = plugin_data_pb2.HParamsPluginData(version=0, session_end_info=end)
    return _hyperparameters(new_event, "_hparams_/session_end_info", data)


def hyperparameters(config: Mapping[str, Any]) -> dict[str, float | bool | str]:
    """The config's values by dotted name, without those that say nothing about what is learned.

    A `_target_` goes by the name of its section ("optimizer": "trainer.optim.adamw"); null and lists are their JSON.
    """
    found: dict[str, float | bool | str] = {}

    def walk(tree: Mapping[str, Any], above: str) -> None:
        for name, value in tree.items():
            key = f"{above}.{name}" if above else str(name)
            if isinstance(value, Mapping):
                walk(value, key)
            elif name == "_target_":
                found[above or name] = str(value)
            elif name != "_partial_":
                found[key] = value if isinstance(value, bool | str) else _number_or_text(value)

    walk({name: value for name, value in config.items() if name not in _NOT_LEARNING}, "")
    return found


def histograms(new_event: Any, step: int, found: Mapping[str, Sequence[Sequence[float]]]) -> Any:
    """One event with a histogram for each tag, from its buckets (left edge, right edge, count)."""
    from tensorboard.compat.proto.types_pb2 import DT_DOUBLE
    from tensorboard.plugins.histogram import metadata

    event = new_event(step=step)
    for tag, buckets in found.items():
        value = event.summary.value.add(tag=tag, metadata=metadata.create_summary_metadata(None, ""))
        value.tensor.dtype = DT_DOUBLE
        for size in (len(buckets), 3):
            value.tensor.tensor_shape.dim.add(size=size)
        for bucket in buckets:
            value.tensor.double_val.extend(bucket)
    return event


def text(new_event: Any, step: int, name: str, words: str) -> Any:
    """Words for the TEXT tab; what comes later under the same name is shown beside it, by its step."""
    from tensorboard.plugins.text import metadata

    event = new_event(step=step)
    value = event.summary.value.add(tag=f"{name}/text_summary", metadata=metadata.create_summary_metadata(name, ""))
    _fill(value.tensor, words.encode())
    return event


def image(new_event: Any, step: int, tag: str, png: bytes, width: int, height: int) -> Any:
    """A picture for the IMAGES tab; its width and height are in pixels."""
    from tensorboard.compat.proto.types_pb2 import DT_STRING
    from tensorboard.plugins.image import metadata

    event = new_event(step=step)
    value = event.summary.value.add(tag=tag, metadata=metadata.create_summary_metadata(None, ""))
    value.tensor.dtype = DT_STRING
    value.tensor.tensor_shape.dim.add(size=3)
    value.tensor.string_val.extend([b"%d" % width, b"%d" % height, png])
    return event


def graph(new_event: Any, picture: Any) -> Any:
    """A drawn autograd graph for the GRAPHS tab, which groups by the modules in the names and opens them on a click."""
    from tensorboard.compat.proto.graph_pb2 import GraphDef

    names: dict[str, str] = {}
    taken: set[str] = set()
    for box in picture.boxes:
        name = plain = "/".join([*box.group, box.title]).replace(" ", "_")
        while name in taken:
            name = f"{plain}_{len(taken)}"
        taken.add(name)
        names[box.key] = name
    found = GraphDef()
    for box in picture.boxes:
        node = found.node.add(name=names[box.key], op=box.lines[0] if box.kind == "operation" else box.kind)
        node.input.extend(names[start] for start, end, _ in picture.arrows if end == box.key)
        for number, line in enumerate(box.lines[1:] if box.kind == "operation" else box.lines):
            node.attr[("shape", "kept")[min(number, 1)]].s = line.encode()
    return new_event(graph_def=found.SerializeToString())


def layout(new_event: Any, step: int, there: Collection[str]) -> Any:
    """The custom charts, but not those of OPTIONAL tags that are not in `there`: they would stay empty."""
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata

    without = tuple(tag for tag in OPTIONAL if tag not in there)
    categories = [
        layout_pb2.Category(
            title=title,
            chart=[
                layout_pb2.Chart(
                    title=name, multiline=layout_pb2.MultilineChartContent(tag=[f"^{tag}$" for tag in tags])
                )
                for name, tags in charts.items()
                if not all(tag.startswith(without) for tag in tags)
            ],
        )
        for title, charts in CHARTS.items()
    ]
    event = new_event(step=step)
    value = event.summary.value.add(tag=metadata.CONFIG_SUMMARY_TAG, metadata=metadata.create_summary_metadata())
    _fill(value.tensor, layout_pb2.Layout(category=categories).SerializeToString())
    return event


def _session_start(new_event: Any, config: dict[str, Any]) -> Any:
    """The hyperparameters. TensorBoard itself finds out which differ between the runs that it shows, and shows those
    first; a description of the whole experiment would keep it from that."""
    from tensorboard.plugins.hparams import plugin_data_pb2

    start = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
    for name, value in hyperparameters(config).items():
        kind = {bool: "bool_value", str: "string_value"}.get(type(value), "number_value")
        setattr(start.hparams[name], kind, value)
    data = plugin_data_pb2.HParamsPluginData(version=0, session_start_info=start)
    return _hyperparameters(new_event, "_hparams_/session_start_info", data)


def _hyperparameters(new_event: Any, tag: str, data: Any) -> Any:
    # All is in the metadata; the tensor is there because every value has one: a vector of no numbers.
    from tensorboard.compat.proto.types_pb2 import DT_FLOAT

    event = new_event()
    value = event.summary.value.add(tag=tag)
    value.metadata.plugin_data.plugin_name = "hparams"
    value.metadata.plugin_data.content = data.SerializeToString()
    value.tensor.dtype = DT_FLOAT
    value.tensor.tensor_shape.dim.add(size=0)
    return event


def _number_or_text(value: Any) -> float | str:
    if isinstance(value, int | float):
        return float(value)
    return json.dumps(_plain(value), ensure_ascii=False)


def _fill(tensor: Any, text: bytes) -> None:
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    tensor.dtype = DT_STRING
    tensor.string_val.append(text)


def _yaml(config: dict[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True))


def _plain(value: Any) -> Any:
    """The value in the types that YAML and JSON have; anything else as its text."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)
