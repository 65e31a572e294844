"""A text-to-video pipeline in small: random weights, but every part there is."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import odsora_compiler as odsora

STEPS = 6


class TextEncoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(258, 8)
        self.out = torch.nn.Linear(8, 8)

    def forward(self, tokens, mask):
        y = self.out(self.embed(tokens)) * mask.unsqueeze(-1)
        return {"y": y.sum(1) / mask.sum(1, keepdim=True)}


class Denoiser(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 16)
        self.text = torch.nn.Linear(8, 16)
        self.second = torch.nn.Linear(16, 4)

    def forward(self, z, t, y):
        x = self.first(z.permute(0, 2, 3, 4, 1)) + 4 * self.text(y)[:, None, None, None]
        x = torch.nn.functional.silu(x + t[:, None, None, None, None])
        return {"v": self.second(x).permute(0, 4, 1, 2, 3)}


class Decoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.out = torch.nn.Linear(4, 3)

    def forward(self, z):
        x = torch.tanh(self.out(z.permute(0, 2, 3, 4, 1))).permute(0, 4, 1, 2, 3)
        return {"video": x.repeat_interleave(4, 3).repeat_interleave(4, 4)}


def tokenizer():
    """A token a byte and one that ends the text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return made.to_str()


def sample(c, tokens, mask, z, guidance):
    y = c.text_encoder(tokens=tokens, mask=mask)
    y = torch.cat([y, torch.zeros_like(y)])
    for step in range(STEPS):
        v = c.denoiser(z=torch.cat([z, z]), t=torch.full((2,), 1 - step / STEPS), y=y)
        text, none = v.chunk(2)
        z = z + (none + guidance * (text - none)) * (1 / STEPS)
    return {"video": c.decoder(z=z)}


def build(frames: int = 5, height: int = 32, width: int = 24, bare: bool = False):
    """`bare`: no guidance to choose, no suffix for the prompt."""
    torch.manual_seed(0)
    z = torch.randn(1, 4, frames, height // 4, width // 4)
    tokens, mask = torch.randint(0, 258, (1, 48)), torch.ones(1, 48, dtype=torch.int64)
    inputs = {"tokens": tokens, "mask": mask, "z": z, "guidance": torch.tensor(3.0)}
    if bare:
        inputs["guidance"] = 3.0
    return odsora.PipelineSpec(
        components={
            "text_encoder": odsora.ModelSpec(TextEncoder(), {"tokens": tokens, "mask": mask}),
            "denoiser": odsora.ModelSpec(
                Denoiser(), {"z": torch.cat([z, z]), "t": torch.rand(2), "y": torch.randn(2, 8)}
            ),
            "decoder": odsora.ModelSpec(Decoder(), {"z": z}),
        },
        host=sample,
        inputs=inputs,
        text_to_video=odsora.TextToVideo(
            tokenizer(),
            fps=12.0,
            guidance="" if bare else "guidance",
            suffix="" if bare else " aesthetic score: {aesthetic_score}.",
        ),
    )
