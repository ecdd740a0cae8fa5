"""The three configurations, model, training and inference: frozen, validated, saved with every result.

Their defaults are the published recipe; :func:`recipe` gives the settings of a named recipe.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Recipe = Literal["default", "published"]
Method = Literal["restormer3d", "gaussian", "temporal-mean", "svd"]
Engine = Literal["auto", "reference", "cpu", "cuda"]
Precision = Literal["fp32", "tf32", "bf16"]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
PatchShape = tuple[
    Annotated[int, Field(ge=8)],
    Annotated[int, Field(ge=8)],
    Annotated[int, Field(ge=8)],
]


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(_Config):
    """Shape of the network.

    Attributes
    ----------
    dim : int
        Channels at full resolution; every level below has twice as many.
    num_blocks : tuple of int
        Transformer blocks per level; the last level is the latent one.
    num_refinement_blocks : int
        Transformer blocks after the decoder, at full resolution.
    heads : tuple of int
        Attention heads per level.
    ffn_expansion_factor : float
        Hidden channels of the GDFN per channel of its input.
    last_level_channels : int
        Channels of the level-1 decoder and the refinement: `dim` reduces the concatenated skip connection
        (3.57M parameters), twice `dim` keeps it as it comes (3.72M, at twice the arithmetic).
    start : {"input", "filters"}
        What the residual is taken from. "input" is the published form: output = input - predicted noise.
        "filters" gives the network Gaussian averages of its window and the temporal mean of the stack, and lets it
        mix them voxel by voxel.
    sigmas_t : tuple of float
        Widths in frames of the temporal averages ("filters" only).
    sigmas_xy, sigmas_relative : tuple of float
        Widths in pixels of the spatial averages taken of each temporal one, `sigmas_xy` as they are,
        `sigmas_relative` relative to the static image ("filters" only).
    fold : tuple of int
        Frames, rows and columns of the blocks of voxels that the network sees as one voxel of many channels
        ("filters" only): it then computes as many times less, and sees as much further.
    """

    dim: Annotated[int, Field(ge=4, multiple_of=4)] = 32
    num_blocks: tuple[int, int, int, int] = (2, 2, 2, 3)
    num_refinement_blocks: int = 2
    heads: tuple[int, int, int, int] = (1, 2, 4, 8)
    ffn_expansion_factor: float = 2.0
    last_level_channels: int = 32
    start: Literal["input", "filters"] = "input"
    sigmas_t: tuple[float, ...] = (1.0, 3.0, 9.0, 27.0)
    sigmas_xy: tuple[float, ...] = (0.7, 1.4, 2.8, 5.6)
    sigmas_relative: tuple[float, ...] = (1.4, 2.8, 5.6, 11.2)
    fold: tuple[int, int, int] = (4, 2, 2)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.last_level_channels not in (self.dim, 2 * self.dim):
            raise ValueError(
                f"last_level_channels must be dim or twice dim ({self.dim} or {2 * self.dim}), "
                f"got {self.last_level_channels}"
            )
        if any(self.dim * 2**level % heads for level, heads in enumerate(self.heads)):
            raise ValueError(f"heads {self.heads} must divide the channels of their levels, dim * 2**level")
        if min(*self.sigmas_t, *self.sigmas_xy, *self.sigmas_relative, 1.0) <= 0:
            raise ValueError("sigmas_t, sigmas_xy and sigmas_relative must be above 0")
        if not self.sigmas_t or max(self.sigmas_xy, default=0.0) <= 1:
            raise ValueError(
                "the network sees averages over frames and over more than a pixel: expected a width in sigmas_t, and "
                f"one above 1 in sigmas_xy, got {self.sigmas_t} and {self.sigmas_xy}"
            )
        return self


class TrainingConfig(_Config):
    """One run of :func:`restormer3d.fit` on one or many stacks.

    Attributes
    ----------
    patch : tuple of int
        Frames, rows and columns of a training patch.
    batch_size : int
        Patches per iteration.
    warmup_iterations : int
        Iterations that regress (L1) onto the temporal median of the stack, before the blind spot.
    iterations : int
        Noise2Void iterations.
    learning_rate, final_learning_rate : float
        Ends of the one cosine that spans warm-up and Noise2Void.
    weight_decay : float
        Of AdamW.
    loss : {"l1", "mse", "noise"}
        Loss on the masked voxels; "noise" is the squared error in units of the local noise variance.
    simulated_target : {"blind_spot", "second_recording"}
        What is learned of simulated scenes (pretraining only): their masked voxels, as of recordings, or a second
        noisy recording of the same scene (Noise2Noise), all voxels of it. Never their truth.
    masked_fraction : float
        Share of the voxels of a patch that are masked.
    blind_spot : "auto" or tuple of int
        Half-extent in (frames, rows, columns) of what is masked around each chosen voxel: (0, 0, 0) is a point.
        "auto" measures how far the noise of each stack is correlated.
    gradient_clip : float
        Largest norm of the gradient.
    ema_decay : float
        Decay per iteration of the running average of the weights that is kept as the result; 0 keeps the last ones.
    held_out : float
        Share of the voxels that are never trained on. A few times during training the network predicts them, and the
        weights that did it best are kept, those of before the training among them; 0 keeps the last ones.
    stop_early : bool
        End where the held-out voxels show no clear gain any more that is worth the time; `iterations` is then the most.
    adapt_mixture : bool
        Fit the mixture of filters to the stack before the network is trained (denoising with "filters" only).
    thinning : float
        Pretraining thins the photons of recorded stacks, patch by patch, to a share drawn between this and 1 (off).
    seed : int
        Of patches, masks and initial weights.
    """

    patch: PatchShape = (32, 64, 64)
    batch_size: Annotated[int, Field(ge=1)] = 2
    warmup_iterations: Annotated[int, Field(ge=0)] = 0
    iterations: Annotated[int, Field(ge=0)] = 800
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    final_learning_rate: Annotated[float, Field(ge=0)] = 1e-6
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    loss: Literal["l1", "mse", "noise"] = "mse"
    simulated_target: Literal["blind_spot", "second_recording"] = "blind_spot"
    masked_fraction: Annotated[float, Field(gt=0, le=0.25)] = 0.015
    blind_spot: Literal["auto"] | tuple[int, int, int] = (0, 0, 0)
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    ema_decay: Fraction = 0.0
    held_out: Annotated[float, Field(ge=0, le=0.1)] = 0.0
    stop_early: bool = False
    adapt_mixture: bool = False
    thinning: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: int = 0


class InferenceConfig(_Config):
    """How the windows slide over a stack.

    Attributes
    ----------
    window : tuple of int
        Frames, rows and columns of a window. That of the training patches with `start="input"`, for attention pools
        over it; wider with "filters", which reach further than a patch and are computed in fewer, larger pieces.
    stretch : float
        An axis of a stack at most this many times as long as the window is taken as a whole. On longer ones windows
        are up to half of that longer, if fewer then suffice.
    overlap_t, overlap_xy : float
        Share of a window that the next one covers again, along time and along rows and columns.
    batch_size : int
        Windows per pass through the network; on CUDA the fewest.
    symmetries : {1, 4, 8}
        Windows averaged over this many flips (4) or flips and quarter turns (8) in the plane; costs as many passes.
    mirror_t : bool
        Whether windows go on beyond both ends of the stack, over mirrored frames, so that every frame lies in as many
        windows as any other; else the first begins with the stack and the last ends with it.
    components : bool
        Whether denoised blocks are reduced to the spatial components that stand out of noise (see
        `activity.components.refine_by_components`); costs a second pass over the stack.
    footprints : bool
        Whether the spatial footprints of the strongest components are then denoised as images (see
        `activity.footprints.denoise_footprints`); only with `components`.
    courses : bool
        Whether their courses in time are then denoised (see `activity.courses.denoise_courses`); only with
        `components`.
    chunk_voxels : int
        Most voxels that components, footprints and courses look at together; about 40 bytes of memory for each. Larger
        stacks are taken in parts, see `tiles`.
    tiles : bool
        How larger stacks are divided; only with `components`. True: into overlapping tiles of the field, each with all
        of its frames (of more than 12,288, with the default `chunk_voxels`, 8,192 or more at a time). Tiles have 64
        rows and columns at least, if the field does; denoised ones wait in a temporary file until the last is done.
        False, or where that file has no room: into runs of frames of the whole field, which is worse.
    planes : "auto" or int
        Planes that the stack shows in turns, frame by frame: they are told apart before anything but what `mend` and
        `stimulus_light` do (see `artefacts.planes.find_planes`). "auto" looks how many there are.
    mend : bool
        Whether frames that are blank, dark or repeat the one before are set aside and put back as they were (see
        `artefacts.idle_frames.frames_shown`), borders that registration has filled are, too (see
        `artefacts.borders.without_borders`), rows and columns along the border that never change are left out and put
        back (see `artefacts.borders.without_constant_edges`), voxels of single frames whose data were lost as well (see
        `artefacts.lost_voxels.without_lost_voxels`), rows of a few frames that are far noisier than others are drawn
        towards frames around (see `artefacts.noisy_rows.noisy_rows`), lines of a bidirectional scan that are displaced
        are aligned, and displaced again afterwards (see `artefacts.scan_lines.line_shift`), noise that differs from
        place to place more than intensities tell is made even (see `artefacts.uneven_noise.uneven_noise`), noise that
        grows or fades along the recording steady (see `artefacts.changing_noise.changing_noise`), noise that goes on
        from frame to frame white (see `artefacts.temporal_correlation.temporal_correlation`), waves of electrical
        ripple and noise that frames or rows share are taken away (see `artefacts.ripple.electrical_ripple`,
        `artefacts.level_noise.level_noise` and `artefacts.row_noise.row_noise`), and voxels that a cosmic ray has hit
        are replaced (see `artefacts.spikes.without_spikes`).
    stimulus_light : bool
        Whether light that bands of rows share in some frames is taken away before, from training too, and put back
        afterwards (see `artefacts.stimulus_light.stimulus_light`).
    movement : {"none", "smooth", "all"}
        Movement of the field that its parts show, rigid or not, which is taken back before anything is denoised, and
        put back afterwards: "smooth" as far as the frames around a frame foretell it, "all" also what jitters from
        frame to frame (see `artefacts.movement.field_movement`).
    static_image : bool
        Whether the temporal mean of the result is denoised as an image (see `static_image.denoise_mean`).
    """

    window: PatchShape = (32, 64, 64)
    stretch: Annotated[float, Field(ge=1)] = 1.0
    overlap_t: Annotated[float, Field(ge=0, le=0.9)] = 0.5
    overlap_xy: Annotated[float, Field(ge=0, le=0.9)] = 0.5
    batch_size: Annotated[int, Field(ge=1)] = 2
    symmetries: Literal[1, 4, 8] = 1
    mirror_t: bool = True
    components: bool = False
    footprints: bool = False
    courses: bool = False
    chunk_voxels: Annotated[int, Field(ge=1)] = 2**26
    tiles: bool = True
    planes: Literal["auto"] | Annotated[int, Field(ge=1)] = 1
    mend: bool = False
    stimulus_light: bool = False
    movement: Literal["none", "smooth", "all"] = "none"
    static_image: bool = False


def recipe(name: Recipe, *, pretrained: bool) -> tuple[ModelConfig, TrainingConfig, InferenceConfig]:
    """Settings of a named recipe.

    Parameters
    ----------
    name : {"default", "published"}
        "published" is the algorithm page to the letter; "default" is what measured best (docs/quality.md).
    pretrained : bool
        Whether training starts from pretrained weights (800 iterations of fine-tuning) or from scratch.

    Returns
    -------
    tuple of ModelConfig, TrainingConfig, InferenceConfig
    """
    if name == "published":
        scratch = TrainingConfig(
            warmup_iterations=200,
            iterations=3000,
            learning_rate=3e-4,
            weight_decay=1e-5,
            final_learning_rate=1e-6,
        )
        return ModelConfig(), TrainingConfig() if pretrained else scratch, InferenceConfig()
    if name != "default":
        raise ValueError(f"recipe must be 'default' or 'published', got {name!r}")
    patch = (128, 48, 48)
    common = {
        "patch": patch,
        "batch_size": 1,
        "loss": "noise",
        "masked_fraction": 0.05,
        "blind_spot": "auto",
        "ema_decay": 0.99,
        "held_out": 0.02,
        "adapt_mixture": True,
    }
    tuned = TrainingConfig.model_validate(common | {"stop_early": True})
    scratch = TrainingConfig.model_validate(common | {"iterations": 3000, "learning_rate": 3e-4})
    model = ModelConfig(start="filters")
    inference = InferenceConfig(
        window=(256, 96, 96),
        stretch=1.5,
        overlap_t=0.25,
        overlap_xy=0.25,
        batch_size=1,
        mirror_t=False,
        components=True,
        footprints=True,
        courses=True,
        planes="auto",
        mend=True,
        stimulus_light=True,
        movement="smooth",
        static_image=True,
    )
    return model, tuned if pretrained else scratch, inference
