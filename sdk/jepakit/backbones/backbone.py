"""The torch side of a bundle: a timm backbone and its weights. Imports torch and timm; only training and export use it."""

from __future__ import annotations

import inspect
import logging
import math
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors.torch import save
from torch import Tensor, nn

from jepakit._files import written
from jepakit._messages import first_few, lines_of
from jepakit._timm_names import check_name
from jepakit.bundles.bundle import MANIFEST, WEIGHTS, is_bundle, open_bundle
from jepakit.bundles.manifest import Backbone, Preprocess, Provenance, StartWeights
from jepakit.config import START_WORDS
from jepakit.errors import BackboneError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecation warnings of torch and timm at import do not concern users
    import timm

_CONVNET_STRIDE = 32
# The arguments that `start_backbone` passes to timm. Others are refused: an untrusted bundle could name a file or URL.
_ARGUMENTS = ("img_size", "dynamic_img_size", "in_chans")


def start_backbone(name: str, weights: str, image_size: int | None, bands: int = 3) -> tuple[nn.Module, Backbone]:
    """Build `name` with the chosen weights for inputs of `image_size` (None: the size of its weights), rounded
    to the patch or stride.

    weights  `pretrained`, `random`, a .safetensors or .pth file, or a bundle of the same architecture
    bands    bands of the images; first-layer weights for three bands are converted by timm's rule (summed for one
             band, repeated and scaled for more)

    Raises BackboneError for an unknown name, an unreachable hub, or a file whose tensors do not fit.
    Weights are never random unless asked for.
    """
    check_name(name)
    arguments = _size_arguments(name, image_size)
    if bands != 3:
        arguments["in_chans"] = bands
    if weights == "pretrained":
        module = _build_pretrained(name, arguments)
        start = _described(name, module)
    elif weights == "random":
        module, start = build(name, arguments), StartWeights(source="random", license="none needed")
    else:
        state, file, license_ = _given_state(weights)
        module = build(name, arguments)
        _load(module, state, file)
        start = StartWeights(source=f"file {file.name}", license=license_ or "unknown")
    return module.eval(), Backbone(name=name, arguments=arguments, start=start)


def fetch(name: str, file: Path) -> StartWeights:
    """Write the pretrained weights of `name`, without its classifier, to a .safetensors file, with their licence.

    `start_backbone` takes the file on a machine that cannot reach the hub. Raises BackboneError for an unknown name or
    an unreachable hub, WriteError if the file cannot be written.
    """
    check_name(name)
    module = _build_pretrained(name, {})
    start = _described(name, module)
    with written(file) as stream:
        stream.write(save(tensors_of(module), start.model_dump()))
    return start


def _described(name: str, module: Any) -> StartWeights:
    """The source and licence of pretrained weights as timm describes them, with their tag."""
    tag = module.pretrained_cfg.get("tag", "")
    return StartWeights(
        source=f"timm {name}" if "." in name else f"timm {name}.{tag}".rstrip("."),
        license=module.pretrained_cfg.get("license") or "unknown",
    )


def build(name: str, arguments: dict[str, Any]) -> Any:
    """The bare architecture with timm's random weights."""
    return timm.create_model(name, pretrained=False, num_classes=0, **arguments)


def restore(backbone: Backbone, state: dict[str, Tensor]) -> nn.Module:
    """The backbone of a bundle, with the bundle's weights, in eval mode.

    Raises BackboneError for a name or argument that jepakit writes into no bundle, and for weights that do not fit.
    """
    check_name(backbone.name)
    for argument in backbone.arguments:
        if argument not in _ARGUMENTS:
            raise BackboneError(
                f"the bundle builds {backbone.name} with {argument[:80]!r}, which jepakit never writes into a bundle (only "
                f"{', '.join(_ARGUMENTS)}): do not trust it"
            )
    try:
        with torch.random.fork_rng(devices=[]):  # timm draws random weights: leave the caller's random state as it was
            module = build(backbone.name, backbone.arguments)
    except Exception as error:  # each architecture raises its own
        raise BackboneError(
            f"timm cannot build {backbone.name} as the bundle says, with {str(backbone.arguments)[:200]}: {lines_of(error)[0]}; "
            "get the bundle again, or export it again with this version of timm"
        ) from error
    _load(module, state, Path(WEIGHTS))
    return module.eval()  # type: ignore[no-any-return]


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The state dict as safetensors takes it: on the CPU, contiguous, tensors with two names (CoaT) copied."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in module.state_dict().items():
        tensor = value.detach().cpu().contiguous()
        tensors[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return tensors


def start_preprocess(module: Any, weights: str, image_size: int) -> Preprocess:
    """How the start weights expect their images: by the bundle that they came from, else by timm."""
    if not is_bundle_weights(weights):
        return stock_preprocess(module, image_size)
    spec = open_bundle(weights).manifest.preprocess
    resize_to = math.floor(image_size * spec.resize_to / spec.size)
    return spec.model_copy(update={"size": image_size, "resize_to": resize_to, "frame": None, "tile": None})


def stock_preprocess(module: Any, image_size: int | None) -> Preprocess:
    """How the backbone's own weights expect their images, from timm's description of them.

    Raises BackboneError if timm does not say: ImageNet's statistics are never assumed.
    """
    described = module.pretrained_cfg
    missing = [key for key in ("mean", "std", "interpolation", "input_size") if not described.get(key)]
    if missing:
        raise BackboneError(
            f"timm does not say how images are prepared for {described.get('architecture')} ({', '.join(missing)} missing)"
        )
    size = image_size or int(described["input_size"][-1])
    crop_mode = described.get("crop_mode") or "center"
    if crop_mode not in ("center", "squash") or described["interpolation"] not in ("bicubic", "bilinear"):
        raise BackboneError(
            f"{described.get('architecture')} needs {described['interpolation']} resizing and crop mode {crop_mode}, which are not supported yet"
        )
    return Preprocess(
        size=size,
        resize_to=math.floor(size / (described.get("crop_pct") or 1.0)),
        resize="squash" if crop_mode == "squash" else "shorter",
        interpolation=described["interpolation"],
        bands=3,
        dtype="uint8",
        mean=tuple(map(float, described["mean"])),
        std=tuple(map(float, described["std"])),
    )


def size_multiple(module: Any) -> int:
    """The number of pixels that an input side must be a multiple of: the patch of a ViT, the stride of a ConvNet."""
    patch = getattr(getattr(module, "patch_embed", None), "patch_size", None)
    if patch is not None and not is_hierarchical(module):
        return int(patch[0] if isinstance(patch, tuple | list) else patch)
    return _CONVNET_STRIDE


def round_size(size: int, multiple: int) -> int:
    """The multiple of `multiple` nearest to `size`, at least one."""
    return max(multiple, round(size / multiple) * multiple)


def is_hierarchical(module: Any) -> bool:
    """Whether features are on grids of decreasing resolution (ConvNets, Swin) rather than in equal blocks (ViT)."""
    levels = getattr(module, "feature_info", None) or []
    return len({level["reduction"] for level in levels}) > 1


def fitting_size(module: Any, size: int) -> int:
    """`size` as the backbone takes it: its own size unchanged, others rounded to its patch or stride."""
    own = (module.pretrained_cfg.get("input_size") or (None,))[-1]
    return size if size == own else round_size(size, size_multiple(module))


def is_bundle_weights(weights: str) -> bool:
    """Whether `weights` names the folder of a bundle."""
    return weights not in START_WORDS and is_bundle(Path(weights))


def provenance_behind(weights: str) -> Provenance | None:
    """The provenance of start weights that are a bundle or the weights file in one; None for all others."""
    folder = Path(weights).parent if Path(weights).name == WEIGHTS else Path(weights)
    return open_bundle(folder).manifest.provenance if weights not in START_WORDS and is_bundle(folder) else None


def _size_arguments(name: str, image_size: int | None) -> dict[str, Any]:
    """What timm needs to build `name` for a size: nothing for ConvNets, image and dynamic size for ViTs."""
    with torch.device("meta"):
        blank = build(name, {})
    accepted = _constructor_arguments(type(blank))
    arguments: dict[str, Any] = {}
    if image_size is not None and "img_size" in accepted:
        arguments["img_size"] = fitting_size(blank, image_size)
    if "dynamic_img_size" in accepted:
        arguments["dynamic_img_size"] = True
    return arguments


def _constructor_arguments(kind: type) -> set[str]:
    """Names of the arguments that a class takes, including those that it passes on to its base classes."""
    names: set[str] = set()
    for base in kind.__mro__:
        parameters = inspect.signature(base).parameters
        names.update(parameters)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return names


def _build_pretrained(name: str, arguments: dict[str, Any]) -> Any:
    from huggingface_hub import constants

    module = build(name, arguments)
    if not (module.pretrained_cfg.get("hf_hub_id") or module.pretrained_cfg.get("url")):
        raise BackboneError(
            f"timm has no pretrained weights for {name}: give weights=FILE, or weights=random to start from nothing"
        )
    try:
        with _silent_hub():
            if not _hub_in_reach(module.pretrained_cfg.get("hf_hub_id")):
                raise ConnectionError
            return timm.create_model(name, pretrained=True, num_classes=0, **arguments)
    except Exception as error:  # hub clients raise whatever their HTTP library does
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else type(error).__name__
        raise BackboneError(
            f"the pretrained weights of {name} could not be fetched ({reason}) from "
            f"{_address(module.pretrained_cfg)}: on another machine run `jepakit weights fetch {name} --out FILE`, or fetch its "
            f"model.safetensors or pytorch_model.bin, and give weights=FILE here (to export, {name}:FILE)"
        ) from None


def _address(config: dict[str, Any]) -> str:
    """The URL of a backbone's pretrained weights, for people."""
    from huggingface_hub import constants

    hub = config.get("hf_hub_id")
    return f"{constants.ENDPOINT}/{hub.split('@')[0]}" if hub else str(config["url"])


@contextmanager
def _silent_hub() -> Iterator[None]:
    """Within the block, downloads show no progress bars or log lines, as jepakit reports itself, and do not tell the hub which
    packages are installed (telemetry)."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger = logging.getLogger("huggingface_hub")
    level, had_bars, no_telemetry = logger.level, not are_progress_bars_disabled(), constants.HF_HUB_DISABLE_TELEMETRY
    logger.setLevel(logging.ERROR)
    disable_progress_bars()
    constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        yield
    finally:
        logger.setLevel(level)
        if had_bars:
            enable_progress_bars()
        constants.HF_HUB_DISABLE_TELEMETRY = no_telemetry


def _hub_in_reach(repository: str | None) -> bool:
    """False when the weights are neither cached nor reachable; saves a minute of retries by the hub client."""
    from huggingface_hub import constants, try_to_load_from_cache

    cached = repository and any(
        isinstance(try_to_load_from_cache(repository.split("@")[0], file), str)
        for file in ("model.safetensors", "pytorch_model.bin")
    )
    if cached or any(name.lower() in ("https_proxy", "all_proxy") for name in os.environ):
        return True
    if constants.HF_HUB_OFFLINE:
        return False
    hub = urlsplit(constants.ENDPOINT)
    try:
        port = hub.port or (80 if hub.scheme == "http" else 443)
        socket.create_connection((hub.hostname or "", port), timeout=10).close()
    except OSError:
        return False
    return True


def _given_state(weights: str) -> tuple[dict[str, Tensor], Path, str | None]:
    """The tensors of a bundle or a file, the file that they are in, and their licence if known."""
    if not is_bundle_weights(weights):
        file = Path(weights)
        state, header = _read_state(file)
        return state, file, header.get("license")
    bundle, file = open_bundle(weights), Path(weights) / WEIGHTS
    bundle.check(WEIGHTS)
    return _read_state(file)[0], file, bundle.manifest.backbone.start.license


def _read_state(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a .safetensors file, or of a .pth file without unpickling anything but tensors."""
    if not file.is_file():
        wrong = f"is a folder, but not a bundle: it has no {MANIFEST}" if file.is_dir() else "does not exist"
        raise BackboneError(f"{file} {wrong}; give a .safetensors or .pth file, a bundle, `pretrained` or `random`")
    try:
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(file, framework="pt") as opened:
                return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # a hostile or damaged file can raise anything
        raise BackboneError(
            f"{file} holds no weights that can be read safely: give a .safetensors file, or a .pth file of plain tensors"
        ) from None
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BackboneError(f"{file} does not hold a plain state dict of tensors")
    return state, {}


def _load(module: Any, state: dict[str, Tensor], file: Path) -> None:
    """Load a timm state dict; BackboneError lists every tensor that is missing, left over or of another shape."""
    classifier = tuple(f"{name}." for name in _classifier_names(module))
    state = {
        key.removeprefix("module."): value.float() if value.is_floating_point() else value
        for key, value in state.items()
    }
    state = {key: value for key, value in state.items() if not (classifier and key.startswith(classifier))}
    state = _with_bands(module, _resampled(module, state, file))
    own = module.state_dict()
    # BatchNorm's counters of training steps are not used in evaluation; some files leave them out.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    left_over = [key for key in state if key not in own]
    misfits = [
        f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    complaints = [
        f"{what}: {first_few(keys, 5)}"
        for what, keys in (("missing", missing), ("left over", left_over), ("of another shape", misfits))
        if keys
    ]
    if complaints:
        remedy = "name the backbone that the weights belong to"
        if not missing and not left_over:
            remedy += ", and their image size where it cannot take another"
        raise BackboneError(
            f"{file} does not fit {module.pretrained_cfg.get('architecture')}: {'; '.join(complaints)}; {remedy}"
        )
    module.load_state_dict(state, strict=False)


def _classifier_names(module: Any) -> tuple[str, ...]:
    names = module.pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _with_bands(module: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert first-layer weights for three bands to the backbone's number of bands, as timm does for its own."""
    from timm.models import adapt_input_conv

    own = module.state_dict()
    names = module.pretrained_cfg.get("first_conv") or ()
    for name in (names,) if isinstance(names, str) else names:
        key = f"{name}.weight"
        if key in state and key in own and state[key].shape[1] == 3 != own[key].shape[1]:
            state = {**state, key: adapt_input_conv(own[key].shape[1], state[key])}
    return state


def _resampled(module: Any, state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The weights as timm would load its own: position embeddings of another grid are interpolated, keys of other
    libraries renamed. A convolution of another size is kept, to be refused: it belongs to another model.
    """
    fit = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    if fit is None:
        return state
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about how timm resizes
            fitted: dict[str, Tensor] = fit(dict(state), module)
    except Exception as error:  # of any kind, if the weights are another model's or timm cannot resize them
        raise BackboneError(
            f"{file} does not fit {module.pretrained_cfg.get('architecture')}, or not at this image size: "
            f"{type(error).__name__}: {error}"
        ) from None
    kernels = {key for key, value in state.items() if key in fitted and key.endswith(".weight") and value.ndim == 4}
    return {key: state[key] if key in kernels else value for key, value in fitted.items()}
