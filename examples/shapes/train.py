"""Train the small text-to-video model from nothing, and write its weights and figures.

    python examples/shapes/train.py               # all of it, to examples/shapes/weights
    python examples/shapes/train.py --evaluate    # only the figures of the weights that are there

Four stages, each on what the one before has made: the spatial autoencoder on single frames, the
temporal one on groups of 17 of its latents, the text encoder on telling what captions say, then
text encoder and denoiser together on the drift of a rectified flow. Everything is drawn from
`--seed`. Checkpoints of the last stage replace one another in the output folder as it goes on.

Two processes of one thread each draw batches of their own and average their gradients, which bears
a busy machine better than two threads that meet at every operator.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import clips
import evaluate
import networks
import numpy as np
import reading
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from vae import SPATIAL_SCALE, VideoVAE

PROCESSES = 2
CLIPS_OF_A_SUBJECT = 64
SPATIAL_STEPS, SPATIAL_BATCH = 1200, 32  # frames
TEMPORAL_STEPS, TEMPORAL_BATCH = 1200, 8  # groups of 17 frames
TEXT_STEPS, TEXT_BATCH = 300, 64
FLOW_STEPS, FLOW_BATCH = 3500, 16
FLOW_RATE = 1e-3
KL_WEIGHT = 3e-5  # of the mean over latent elements, against the mean error of a pixel
FRAMES_DECODED = 2  # of each group, where the temporal stage looks at pixels
TEXT_DROPPED = 0.1  # share of the captions replaced by the embedding of no text
CHECKPOINT_STEPS = 1000  # of the last stage
# Where a shape goes is settled while the state is nearly all noise, above about s = 0.85, because
# many latent elements of every frame tell of it; most of the training has to happen there.
NOISY, SPREAD = 1.0, 1.4  # mean and deviation of log(s / (1 - s)), s being timestep / 1000
AVERAGE = 0.999  # decay of the moving average of weights
SEEDS = (0, 1)  # of the evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=networks.WEIGHTS, help="folder of the weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--flow-steps", type=int, default=FLOW_STEPS, help="steps of the last stage"
    )
    parser.add_argument("--evaluate", action="store_true", help="train nothing")
    options = parser.parse_args()
    if options.evaluate:
        print(json.dumps(measure(networks.load(options.out), options.seed), indent=2))
        return
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (options.out, options.seed, options.flow_steps, Path(folder) / "meeting")
        torch.multiprocessing.spawn(train, arguments, nprocs=PROCESSES)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures = {
        "seed": options.seed,
        "steps": {
            "spatial autoencoder": SPATIAL_STEPS,
            "temporal autoencoder": TEMPORAL_STEPS,
            "text encoder alone": TEXT_STEPS,
            "text encoder and denoiser": options.flow_steps,
        },
        "processes of one thread": PROCESSES,
        "wall time, minutes": round((time.monotonic() - start) / 60, 1),
        "CPU time, minutes": round((spent.ru_utime + spent.ru_stime) / 60, 1),
        "load of the machine, mean of the last 15 minutes": round(os.getloadavg()[2], 1),
        # What is measured is what was saved: the weights after rounding.
        **measure(networks.load(options.out), options.seed),
        "bytes of weights": sum(f.stat().st_size for f in options.out.glob("*.safetensors")),
    }
    (options.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def train(rank: int, folder: Path, seed: int, flow_steps: int, meeting: Path) -> None:
    """Fill `folder` with weights: one of `PROCESSES` processes that meet through a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=PROCESSES
    )
    torch.manual_seed(seed)  # the same weights in each process, then batches of its own
    model = networks.Networks(
        networks.text_encoder(),
        networks.denoiser(),
        networks.video_vae(),
        networks.tokenizer(),
    )
    films = render_all(np.random.default_rng(seed))
    torch.manual_seed(PROCESSES * seed + rank)
    random = np.random.default_rng([seed, rank])
    columns = (
        TextColumn("{task.description} {task.fields[loss]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(quiet=rank > 0)
    with Progress(*columns, console=console) as progress:
        train_spatial(model.vae, films, progress)
        latents = train_temporal(model.vae, films, progress)
        train_text(model, random, progress)
        train_flow(model, latents, random, flow_steps, folder, progress)
    if rank == 0:
        networks.save(model, folder)
    dist.destroy_process_group()


def measure(model: networks.Networks, seed: int) -> dict[str, object]:
    """Prompt adherence in %, what the autoencoder loses on clips it has not seen, parameters."""
    unseen = render_all(np.random.default_rng(seed + 1000), 1)
    decoded = np.concatenate(
        [
            evaluate.to_pixels(model.vae(encode(model.vae, batch), clips.FRAMES)["video"].detach())
            for batch in torch.from_numpy(unseen).split(16)
        ]
    )
    read_back = [
        reading.read(film).agrees(subject)["all"]
        for film, subject in zip(decoded, clips.SUBJECTS, strict=True)
    ]
    parts = {"text encoder": model.text_encoder, "denoiser": model.denoiser, "vae": model.vae}
    return {
        "prompt adherence, %": evaluate.adherence(model, SEEDS),
        "films evaluated": len(SEEDS) * len(clips.SUBJECTS),
        "sampler steps": networks.STEPS,
        "guidance": networks.GUIDANCE,
        "autoencoder, PSNR in dB": reading.psnr(
            decoded.reshape(-1, *decoded.shape[2:]), unseen.reshape(-1, *unseen.shape[2:])
        ),
        "autoencoder, clips read right, %": 100 * float(np.mean(read_back)),
        "parameters": {name: sum(p.numel() for p in m.parameters()) for name, m in parts.items()},
    }


def render_all(random: np.random.Generator, each: int = CLIPS_OF_A_SUBJECT) -> NDArray[np.uint8]:
    """`each` clips of every subject, [48·each, frames, 3, 32, 32]; that of clip i is i mod 48."""
    films = [clips.render(subject, random) for _ in range(each) for subject in clips.SUBJECTS]
    return np.stack([(255 * film).round().astype(np.uint8) for film in films])


# ---- the autoencoder


def train_spatial(vae: VideoVAE, films: NDArray[np.uint8], progress: Progress) -> None:
    """AutoencoderKL on single frames: absolute and square error of pixels, and a little KL."""
    module = vae.spatial_vae.module
    frames = torch.from_numpy(films).flatten(0, 1)
    optimiser = torch.optim.AdamW(module.parameters(), lr=2e-3, betas=(0.9, 0.99))
    for descend in steps("spatial", SPATIAL_STEPS, optimiser, progress):
        x = unit(frames[torch.randint(len(frames), (SPATIAL_BATCH // PROCESSES,))])
        posterior = module.encode(x).latent_dist
        loss = picture_error(module.decode(posterior.sample()).sample, x)
        descend(loss + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel())


def train_temporal(vae: VideoVAE, films: NDArray[np.uint8], progress: Progress) -> Tensor:
    """The temporal part on latents of frames, with the spatial decoder following; all latents.

    Some frames of each group are decoded, so that what counts is what is seen. At the end `scale`
    and `shift` are set to the standard deviation and mean of each channel; the latents returned,
    [clips, 4, T, H, W], are normalised by them.
    """
    spatial, temporal = vae.spatial_vae.module, vae.temporal_vae
    groups = torch.from_numpy(films).unflatten(1, (-1, networks.GROUP_FRAMES)).flatten(0, 1)
    all_single = shared(groups, lambda some: frame_latents(vae, some))
    deviation = all_single.std()
    followers = [*spatial.decoder.parameters(), *spatial.post_quant_conv.parameters()]
    optimiser = torch.optim.AdamW(
        [{"params": temporal.parameters(), "lr": 2e-3}, {"params": followers, "lr": 5e-4}],
        betas=(0.9, 0.99),
    )
    for descend in steps("temporal", TEMPORAL_STEPS, optimiser, progress):
        chosen = torch.randint(len(groups), (TEMPORAL_BATCH // PROCESSES,))
        single = all_single[chosen]
        mean, log_variance = temporal.encode(single).chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        back = temporal.decode(z, networks.GROUP_FRAMES)
        some = torch.randint(networks.GROUP_FRAMES, (FRAMES_DECODED,))
        pictures = vae.spatial_vae.decode(back[:, :, some]).transpose(1, 2)
        error = ((back - single) / deviation).square().mean()
        wanted = unit(groups[chosen][:, some])
        descend(picture_error(pictures, wanted) + 0.1 * error + KL_WEIGHT * kl)

    vae.scale.fill_(1)
    vae.shift.zero_()
    latents = ungrouped(shared(all_single, lambda some: temporal_latents(vae, some)))
    vae.scale.copy_(latents.std(dim=(0, 2, 3, 4), keepdim=True))
    vae.shift.copy_(latents.mean(dim=(0, 2, 3, 4), keepdim=True))
    return (latents - vae.shift) / vae.scale


def encode(vae: VideoVAE, films: Tensor) -> Tensor:
    """Films [B, 34, 3, H, W] of bytes to the latents [B, 4, T, h, w] that `vae` decodes."""
    groups = films.unflatten(1, (-1, networks.GROUP_FRAMES)).flatten(0, 1)
    return ungrouped(temporal_latents(vae, frame_latents(vae, groups)))


@torch.no_grad()
def frame_latents(vae: VideoVAE, films: Tensor) -> Tensor:
    """Films [B, T, 3, H, W] of bytes to latents of each frame, [B, 4, T, h, w]."""
    mean = vae.spatial_vae.module.encode(unit(films.flatten(0, 1))).latent_dist.mean
    return SPATIAL_SCALE * mean.unflatten(0, films.shape[:2]).transpose(1, 2)


@torch.no_grad()
def temporal_latents(vae: VideoVAE, single: Tensor) -> Tensor:
    """Latents of each of 17 frames to normalised latents of the group, [B, 4, 5, h, w]."""
    mean, _ = vae.temporal_vae.encode(single).chunk(2, dim=1)
    return (mean - vae.shift) / vae.scale


def ungrouped(latents: Tensor) -> Tensor:
    """The latents of groups, two after another being those of a film: [B/2, 4, 10, h, w]."""
    groups = networks.FRAMES // networks.GROUP_FRAMES
    return latents.unflatten(0, (-1, groups)).transpose(1, 2).flatten(2, 3)


def shared(inputs: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function` of all inputs, each process having worked on its share of them."""
    own = inputs.chunk(PROCESSES)[dist.get_rank()]
    result = torch.cat([function(batch) for batch in own.split(32)])
    results = [torch.empty_like(result) for _ in range(PROCESSES)]
    dist.all_gather(results, result)
    return torch.cat(results)


def unit(pixels: Tensor) -> Tensor:
    """Bytes to -1..1."""
    return pixels.float() / 127.5 - 1


def picture_error(made: Tensor, wanted: Tensor) -> Tensor:
    difference = made - wanted
    return difference.abs().mean() + difference.square().mean()


# ---- text and denoiser


def train_text(model: networks.Networks, random: np.random.Generator, progress: Progress) -> None:
    """The text encoder on naming colour, shape and direction: three heads that are thrown away."""
    words = (tuple(clips.COLOURS), clips.SHAPES, tuple(clips.DIRECTIONS))
    width = model.text_encoder.config.d_model
    heads = nn.ModuleList(nn.Linear(width, len(names)) for names in words)
    parameters = [*model.text_encoder.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3)
    for descend in steps("text", TEXT_STEPS, optimiser, progress):
        chosen = random.integers(len(clips.SUBJECTS), size=TEXT_BATCH // PROCESSES)
        features, mask = features_of(model, chosen, random)
        weights = mask[:, :, None] / mask.sum(dim=1)[:, None, None]
        mean = (features * weights).sum(dim=1)
        loss = torch.zeros(())
        for head, names, name in zip(heads, words, ("colour", "shape", "direction"), strict=True):
            wanted = [names.index(getattr(clips.SUBJECTS[i], name)) for i in chosen]
            loss = loss + F.cross_entropy(head(mean), torch.tensor(wanted))
        descend(loss)


def train_flow(
    model: networks.Networks,
    latents: Tensor,
    random: np.random.Generator,
    flow_steps: int,
    folder: Path,
    progress: Progress,
) -> None:
    """Text encoder and denoiser together on the drift from noise to `latents`.

    At timestep t the state is (1 - t/1000)·latent + t/1000·noise, and the drift is latent - noise:
    rectified flow, arXiv 2209.03003; timesteps are logit-normal, arXiv 2403.03206. `model` is left
    with the moving average of the weights.
    """
    start_as_identity(model)
    trained = nn.ModuleList([model.text_encoder, model.denoiser])
    average = copy.deepcopy(trained)
    averaged = networks.Networks(average[0], average[1], model.vae, model.tokenizer)
    optimiser = torch.optim.AdamW(
        trained.parameters(), lr=FLOW_RATE, betas=(0.9, 0.99), weight_decay=0.01
    )
    no_text = model.denoiser.y_embedder.y_embedding
    for step, descend in enumerate(steps("denoiser", flow_steps, optimiser, progress)):
        chosen = random.integers(len(latents), size=FLOW_BATCH // PROCESSES)
        features, mask = features_of(model, chosen % len(clips.SUBJECTS), random)
        dropped = torch.rand(len(chosen), 1, 1) < TEXT_DROPPED
        y = torch.where(dropped, no_text, features)[:, None]

        data = latents[torch.from_numpy(chosen)]
        noise = torch.randn_like(data)
        s = torch.sigmoid(NOISY + SPREAD * torch.randn(len(chosen)))
        share = s[:, None, None, None, None]
        z = (1 - share) * data + share * noise
        drift = networks.drift(model.denoiser, z, 1000 * s, y, mask)
        descend((drift - (data - noise)).square().mean())

        decay = min(AVERAGE, (step + 1) / (step + 10))
        with torch.no_grad():
            for old, new in zip(average.parameters(), trained.parameters(), strict=True):
                old.lerp_(new, 1 - decay)
        if (step + 1) % CHECKPOINT_STEPS == 0 and dist.get_rank() == 0:
            networks.save(averaged, folder)
            reached = evaluate.adherence(averaged, SEEDS[:1])
            progress.console.print(f"denoiser, step {step + 1}: adherence {reached}")
    trained.load_state_dict(average.state_dict())


def start_as_identity(model: networks.Networks) -> None:
    """Zero what closes every residual branch and the output, as DiT does (arXiv 2212.09748)."""
    denoiser = model.denoiser
    blocks = [*denoiser.spatial_blocks, *denoiser.temporal_blocks]
    closing = [denoiser.t_block[1], denoiser.final_layer.linear]
    closing += [block.cross_attn.proj for block in blocks]
    for layer in closing:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for block in blocks:
        nn.init.zeros_(block.scale_shift_table)


def features_of(
    model: networks.Networks, subjects: NDArray[np.int64], random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Text features [B, 48, d] of a caption of each of the subjects (indices), and their mask."""
    captions = [clips.caption(clips.SUBJECTS[i], random) for i in subjects]
    ids, mask = networks.encode(model.tokenizer, captions)
    return model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask


def steps(
    stage: str, count: int, optimiser: torch.optim.Optimizer, progress: Progress
) -> Iterator[Callable[[Tensor], None]]:
    """For each of `count` steps, what takes a step down the loss that it is given.

    The rate warms up for a twentieth of the steps and then falls along a cosine. Every tenth of the
    stage the mean loss of that tenth is printed.
    """
    task = progress.add_task(stage, total=count, loss="")
    warm = max(count // 20, 1)
    peaks = [group["lr"] for group in optimiser.param_groups]
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    losses: list[float] = []

    def descend(loss: Tensor) -> None:
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        losses.append(loss.item())

    for step in range(count):
        cosine = 0.5 * (1 + math.cos(math.pi * max(step - warm, 0) / (count - warm)))
        for group, peak in zip(optimiser.param_groups, peaks, strict=True):
            group["lr"] = peak * min((step + 1) / warm, 1) * (0.02 + 0.98 * cosine)
        yield descend
        progress.update(task, advance=1, loss=f"loss {np.mean(losses[-50:]):.4f}")
        if (step + 1) % max(count // 10, 1) == 0:
            mean = np.mean(losses)
            losses.clear()
            progress.console.print(f"{stage}, step {step + 1} of {count}: loss {mean:.4f}")


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Make the gradients their mean over the processes."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= PROCESSES
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


if __name__ == "__main__":
    main()
