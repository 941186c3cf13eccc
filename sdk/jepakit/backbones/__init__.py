"""The torch side of a bundle: timm backbones, and the model that defines the vector."""
