"""Transformer layers, and the conv-transformer of SimCLR, 3KG, CLOCS, Wav2Vec 2 and W2V-CMSC."""

import torch
import torch.nn as nn
import torch.nn.functional as F

# `small` is made for 100 Hz, where a token is 160 ms.
CONV_SIZES = {
    "published": dict(width=768, layers=12, heads=12, feed_forward=3072, kernel_size=128),
    "small": dict(width=256, layers=4, heads=4, feed_forward=1024, kernel_size=32),
}


class Layer(nn.Module):
    """Self-attention, then a feed-forward network: (B, N, D) -> (B, N, D).

    pre_norm: normalise what enters each of the two, else what leaves them.  heads * head_dim need
    not be D.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        feed_forward: int,
        *,
        head_dim: int | None = None,
        pre_norm: bool = False,
        qkv_bias: bool = True,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.pre_norm = pre_norm
        inner = heads * (head_dim or width // heads)
        self.qkv = nn.Linear(width, 3 * inner, bias=qkv_bias)
        self.out = nn.Linear(inner, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.widen = nn.Linear(width, feed_forward)
        self.narrow = nn.Linear(feed_forward, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, is_real: torch.Tensor | None = None) -> torch.Tensor:
        """is_real: (B, N) bool, False for padding, to which nobody attends."""
        if self.pre_norm:
            x = x + self.dropout(self.attend(self.norm1(x), is_real))
            return x + self.dropout(self.feed_forward(self.norm2(x)))
        x = self.norm1(x + self.dropout(self.attend(x, is_real)))
        return self.norm2(x + self.dropout(self.feed_forward(x)))

    def attend(self, x: torch.Tensor, is_real: torch.Tensor | None) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, N, heads, d) each
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, N, d)
        mask = None if is_real is None else is_real[:, None, None]  # (B, 1, 1, N)
        p = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(F.gelu(self.widen(x)))


class Encoder(nn.Module):
    """(B, leads, T) -> (B, D), with the attributes of ResNet1D that checkpoints and probes read.

    architecture: the network's other arguments; as an attribute it has `leads` too.
    """

    def __init__(self, leads: int, embedding_dim: int, **architecture) -> None:
        super().__init__()
        self.architecture = dict(leads=leads, **architecture)
        self.leads = leads
        self.embedding_dim = embedding_dim
        self.lead: str | None = None
        self.sample_rate_hz: float | None = None
        self.preprocessing: dict | None = None
        self.training_data: list[dict] = []


def halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the second five seconds: (B, L, T) -> (B, L, T // 2) twice."""
    T = x.shape[-1] // 2
    return x[..., :T], x[..., T : 2 * T]


class ConvTransformer(Encoder):
    """Four convolutions, a token for 16 samples, then a post-norm transformer.

    (B, leads, T) -> (B, D): both halves of the record on their own, the mean over time of the last
    layer in each, and the mean of the two.  Under a linear head this is the published mean of the
    logits of two segments.  The published form drops out a tenth of the projected latents, too.
    train_pretrain.py and --finetune train it without its dropout.
    """

    def __init__(
        self,
        leads: int = 12,
        *,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        feed_forward: int = 3072,
        kernel_size: int = 128,
    ) -> None:
        shape = dict(width=width, layers=layers, heads=heads, feed_forward=feed_forward)
        super().__init__(leads, embedding_dim=width, kernel_size=kernel_size, **shape)
        channels = [leads, 256, 256, 256, 256]
        self.convs = nn.ModuleList(
            nn.Conv1d(c_in, c_out, 2, stride=2, bias=False)
            for c_in, c_out in zip(channels[:-1], channels[1:], strict=True)
        )
        self.conv_norm = nn.GroupNorm(256, 256)  # behind the first: each channel over time
        self.latent_norm = nn.LayerNorm(256)
        self.project = nn.Linear(256, width)
        position = nn.Conv1d(width, width, kernel_size, padding=kernel_size // 2, groups=16)
        self.input_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.1)
        self.layers = nn.ModuleList(Layer(width, heads, feed_forward) for _ in range(layers))
        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.normal_(position.weight, std=(4 / (kernel_size * width)) ** 0.5)
        nn.init.zeros_(position.bias)
        self.position = nn.utils.parametrizations.weight_norm(position, dim=2)

    def latents(self, x: torch.Tensor) -> torch.Tensor:
        """What the convolutions see in a segment: (B, leads, T) -> (B, N, 256), a row a token."""
        for i, conv in enumerate(self.convs):
            x = conv(x)
            if i == 0:
                x = self.conv_norm(x)
            x = F.gelu(x)
        if x.requires_grad:
            x.register_hook(slow_down)
        return x.transpose(1, 2)

    def contextualise(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, N, D), each token knowing the others and its place among them."""
        places = self.position(tokens.transpose(1, 2))[..., :-1]  # (B, D, N)
        tokens = self.input_norm(tokens + F.gelu(places).transpose(1, 2))
        tokens = self.dropout(tokens)
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """The last layer of one segment: (B, leads, T) -> (B, N, D), a token for 16 samples."""
        return self.contextualise(self.project(self.latent_norm(self.latents(x))))

    def embed_segment(self, x: torch.Tensor) -> torch.Tensor:
        """One segment of five seconds: (B, leads, T) -> (B, D)."""
        return self.tokens(x).float().mean(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        segments = torch.cat(halves(x))  # (2 B, leads, T // 2), all first ones before all second
        first, second = self.embed_segment(segments).chunk(2)  # (B, D) each
        return (first + second) / 2


def slow_down(gradient: torch.Tensor) -> torch.Tensor:
    """As published.  AdamW undoes it but for the norm that is clipped."""
    return 0.1 * gradient
