"""Schema of a flow's configuration: nested frozen dataclasses, which hold all defaults.

`pipeline.config.load` reads configurations from YAML files of differences and `--set` overrides;
`pipeline.config.keys` lists the keys with their rules.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from flows.networks.config import VelocityConfig
from pipeline.config.data import (
    IMAGE_SETS,
    TABLES,
    DataConfig,
    EncoderConfig,
    LatentsConfig,
    PointsConfig,
)
from pipeline.config.keys import setting
from pipeline.config.sampling import EvaluateConfig, GenerateConfig, SamplerConfig
from pipeline.config.training import (
    FmConfig,
    JkoConfig,
    LfmConfig,
    MatchingConfig,
    ScheduleConfig,
    TrainConfig,
)
from pipeline.errors import UserError


@dataclass(frozen=True)
class Config:
    """Configuration of a flow.

    Which of the sections schedule, matching, jko, lfm and fm are there, train.objective decides.
    The section points is there for two-dimensional experiments alone.

    Attributes:
        name: of the run, whose default directory is runs/NAME.
        data: images, or points in the plane.
        autoencoder: autoencoder whose latents the flow models.
        latents: latent cache.
        velocity: velocity network of a block.
        train: training of the blocks.
        schedule: number of blocks and growth of their steps, under jko and lfm.
        matching: options of the regression, under lfm and fm.
        jko: objective jko.
        lfm: objective lfm.
        fm: objective fm.
        sampler: solver of finished blocks.
        generate: sampling.
        evaluate: evaluation.
        points: two-dimensional experiments.
    """

    name: str = setting("run", resume="free")
    data: DataConfig = field(default_factory=DataConfig)
    autoencoder: EncoderConfig = field(default_factory=EncoderConfig)
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    velocity: VelocityConfig = field(
        default_factory=VelocityConfig, metadata={"resume": "added", "fixed": ("classes",)}
    )
    train: TrainConfig = field(default_factory=TrainConfig)
    schedule: ScheduleConfig | None = None
    matching: MatchingConfig | None = None
    jko: JkoConfig | None = None
    lfm: LfmConfig | None = None
    fm: FmConfig | None = None
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig, metadata={"resume": "free"})
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig, metadata={"resume": "free"})
    points: PointsConfig | None = field(default=None, metadata={"resume": "free"})

    def __post_init__(self) -> None:
        """Make the sections that apply, and refuse those that do not.

        Raises:
            UserError: a section of another objective, or points under images.
        """
        for name, (kind, _) in SECTIONS.items():
            applies, there = self.has(name), getattr(self, name)
            if applies and there is None:
                object.__setattr__(self, name, kind())
            elif there is not None and not applies:
                raise UserError(
                    f"section {name} applies to {WHERE[name]}; this configuration has "
                    f"train.objective={self.train.objective} and data.name={self.data.name}; "
                    "remove it"
                )

    def has(self, section: str) -> bool:
        """Return whether a section applies: all do but those of other objectives, and points."""
        if section == "points":
            return self.data.name not in (*IMAGE_SETS, *TABLES)
        return section not in SECTIONS or self.train.objective in SECTIONS[section][1]

    @property
    def regression(self) -> MatchingConfig:
        """The options of the regression; those of distillation are the defaults."""
        return self.matching or MatchingConfig()


#: sections that apply under a condition, and the objectives that they belong to
SECTIONS: dict[str, tuple[type, tuple[str, ...]]] = {
    "schedule": (ScheduleConfig, ("jko", "lfm")),
    "matching": (MatchingConfig, ("lfm", "fm")),
    "jko": (JkoConfig, ("jko",)),
    "lfm": (LfmConfig, ("lfm",)),
    "fm": (FmConfig, ("fm",)),
    "points": (PointsConfig, ()),
}
#: their conditions, in words
WHERE = {
    name: f"train.objective={' or '.join(objectives)}"
    for name, (_, objectives) in SECTIONS.items()
} | {"points": "`jkoflow toy2d`, where data.name is a set of points"}
