"""Entry points for `torch.hub.load`, with the names and arguments of facebookresearch/dinov2."""

import dinoreg as _dinoreg

dependencies = ["torch", "numpy", "PIL", "safetensors"]


def _entry(name):
    config, classifier = _dinoreg.CONFIGS[name.removesuffix("_lc")], name.endswith("_lc")

    def backbone(*, pretrained: bool = True):
        return _dinoreg.load(name) if pretrained else _dinoreg.DinoVisionTransformer(config)

    def linear_classifier(*, layers: int = 4, pretrained: bool = True):
        if pretrained:
            return _dinoreg.load(name, layers)
        return _dinoreg.LinearClassifier(_dinoreg.DinoVisionTransformer(config), 1000, layers)

    entry = linear_classifier if classifier else backbone
    entry.__name__ = f"dinov2_{name}"
    entry.__doc__ = f"dinov2_{name}: trained on ImageNet-1k's classes" if classifier else f"dinov2_{name}: the backbone"
    return entry


for _name in _dinoreg.CONFIGS:
    globals()[f"dinov2_{_name}"] = _entry(_name)
    globals()[f"dinov2_{_name}_lc"] = _entry(f"{_name}_lc")
