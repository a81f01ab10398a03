"""The last block of a vision transformer whose embedding is the class token, computed for that token alone.

The other tokens reach the embedding only as its keys and values. At depth 6 a seventh of the matrix products is saved.
"""

import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from backbone.lora import LoRALinear


class ClassTokenBlock(nn.Module):
    """A timm `Block` (whose layers it takes over): tokens (B, N, dim) → its output for the first one, (B, 1, dim)."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        for name, layer in block.named_children():
            self.add_module(name, layer)
        self.training = block.training

    def forward(self, x: Tensor) -> Tensor:
        token = x[:, :1]
        token = token + self.drop_path1(self.ls1(self._attend(self.norm1(x))))
        return token + self.drop_path2(self.ls2(self.mlp(self.norm2(token))))

    def _attend(self, x: Tensor) -> Tensor:
        """The attention of the first of the tokens (B, N, dim) to all of them, (B, 1, dim)."""
        attn = self.attn
        width = attn.num_heads * attn.head_dim
        q = attn.q_norm(_heads(_rows_of(attn.qkv, slice(0, width), x[:, :1]), 1, attn)[0])
        k, v = _heads(_rows_of(attn.qkv, slice(width, None), x), 2, attn)
        k = attn.k_norm(k)
        if attn.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=attn.attn_drop.p if self.training else 0.0)
        else:
            x = attn.attn_drop((q * attn.scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        return attn.proj_drop(attn.proj(x.transpose(1, 2).flatten(2)))


def _rows_of(linear: nn.Linear, rows: slice, x: Tensor) -> Tensor:
    """The outputs `rows` of a linear layer, with its adapter if it has one."""
    bias = None if linear.bias is None else linear.bias[rows]
    y = F.linear(x, linear.weight[rows], bias)
    return y + linear.update(x, linear.lora_B[rows]) if isinstance(linear, LoRALinear) else y


def _heads(x: Tensor, count: int, attn: Attention) -> tuple[Tensor, ...]:
    """`count` of queries, keys and values side by side, (B, N, count · dim) → each (B, heads, N, head dim)."""
    return x.unflatten(2, (count, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)


def replace_last_block(model: nn.Module) -> None:
    """Compute the class token alone in the last block of each plain timm ViT in `model`, where it is the embedding."""
    for module in model.modules():
        if type(module) is VisionTransformer and module.global_pool == "token" and module.attn_pool is None:
            block = module.blocks[-1]
            if type(block) is Block and type(block.attn) is Attention and isinstance(block.attn.norm, nn.Identity):
                module.blocks[-1] = ClassTokenBlock(block)
