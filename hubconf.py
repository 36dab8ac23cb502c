"""Entry points for `torch.hub.load`, with the names and arguments of facebookresearch/dinov2."""

import dataclasses as _dataclasses

import dinoreg as _dinoreg

dependencies = ["torch", "numpy", "PIL", "safetensors"]

# The official keyword arguments that change a model's tensors, then those that do not, and the
# fields of `dinoreg.Config`.
_SHAPES = {"img_size": "image_size", "ffn_layer": "ffn"}
_SHAPES |= {name: name for name in ("patch_size", "in_chans", "mlp_ratio", "num_register_tokens")}
_FIELDS = _SHAPES | {"init_values": "layerscale_init"}
_FIELDS |= {
    name: name
    for name in (
        "drop_path_rate",
        "drop_path_uniform",
        "interpolate_antialias",
        "interpolate_offset",
    )
}
# No other values are supported.
_FIXED = {"block_chunks": 0, "qkv_bias": True, "proj_bias": True, "ffn_bias": True}


def _entry(name):
    config, classifier = _dinoreg.CONFIGS[name.removesuffix("_lc")], name.endswith("_lc")
    released = "IMAGENET1K" if classifier else "LVD142M"

    def build(layers, pretrained, weights, arguments):
        if getattr(weights, "name", weights) != released:
            raise ValueError(f"weights must be {released!r}, got {weights!r}")
        for key, value in arguments.items():
            if key not in _FIELDS and (key not in _FIXED or value != _FIXED[key]):
                known = ", ".join(["pretrained", "weights", *["layers"] * classifier, *_FIELDS])
                raise ValueError(
                    f"dinov2_{name} does not take {key}={value!r}; its arguments are {known}"
                )
        fields = {
            _FIELDS[key]: "swiglu" if x == "swiglufused" else x
            for key, x in arguments.items()
            if key in _FIELDS
        }
        changed = _dataclasses.replace(config, **fields)
        if not pretrained:
            model = _dinoreg.DinoVisionTransformer(changed)
            return _dinoreg.LinearClassifier(model, 1000, layers) if classifier else model
        for key, field in _SHAPES.items():
            if (value := getattr(changed, field)) != (trained := getattr(config, field)):
                raise ValueError(
                    f"{key} is {trained!r} in the official weights, not {value!r}; "
                    "give pretrained=False too"
                )
        model = _dinoreg.load(name, layers)
        if changed == config:
            return model
        labels = getattr(model, "labels", None)
        return _dinoreg.from_state_dict(model.state_dict(), changed, labels)

    def backbone(*, pretrained: bool = True, weights="LVD142M", **arguments):
        return build(4, pretrained, weights, arguments)

    def linear_classifier(
        *, layers: int = 4, pretrained: bool = True, weights="IMAGENET1K", **arguments
    ):
        return build(layers, pretrained, weights, arguments)

    entry = linear_classifier if classifier else backbone
    entry.__name__ = f"dinov2_{name}"
    kind = "trained on ImageNet-1k's classes" if classifier else "the backbone"
    entry.__doc__ = f"dinov2_{name}: {kind}"
    return entry


for _name in _dinoreg.CONFIGS:
    globals()[f"dinov2_{_name}"] = _entry(_name)
    globals()[f"dinov2_{_name}_lc"] = _entry(f"{_name}_lc")
