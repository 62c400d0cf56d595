"""The paper's experiments as data: which runs stand in which cell, at which scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeflame.methods import FEDERATED_METHODS, METHODS, Training, merge_settings
from paper import printed
from paper.peers import PEERS
from paper.runs import Run

SEEDS = (0, 1, 2)

Settings = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The size of the experiments.

    Attributes:
        backbones: of Tables 1 to 3.
        textures: of Table 1's boards.
        fleet_textures: of Table 2's boards; all other experiments use the first.
        boards, tiles: the data's settings.
        learning: what all runs learn with.
        fleet: rounds and the like.
        parties: rows of Table 5: sites, share sampled, rounds.
        sites: number of sites in all other experiments.
        party_methods, csflow: methods of Table 5 (empty for all), and whether the slow CS-Flow is run.
        sigmas, epochs: the grids of Figs. 9 and 14.
    """

    backbones: tuple[str, ...]
    textures: tuple[str, ...]
    fleet_textures: tuple[str, ...]
    boards: Settings
    tiles: Settings
    learning: Settings
    tile_learning: Settings
    fleet: Settings
    sites: int
    parties: tuple[tuple[int, float, int], ...]
    party_boards: Settings
    party_methods: tuple[str, ...]
    csflow: bool
    sigmas: tuple[tuple[float, str], ...]
    epochs: tuple[int, ...]


def input_of(side: int) -> Settings:
    return {"height": side, "width": side}


SMALL = Scale(
    backbones=("tf_efficientnet_lite0",),
    textures=("warm_white_grid", "warm_wood"),
    fleet_textures=("warm_white_grid",),
    boards={"train_parts": 60, "test_good_parts": 30, "test_defective_parts": 50, "photos": 1, "image_size": 64},
    tiles={"max_train_groups": 20, "max_test_groups": 5},
    # Smoothing as wide, for the picture, as the default is at 256 x 256.
    learning={"input": input_of(64), "scoring": {"smoothing_sigma": 0.5}},
    tile_learning={"input": input_of(64), "scoring": {"smoothing_sigma": 0.5}},
    fleet={"rounds": 3},
    sites=5,
    parties=((50, 1.0, 2), (100, 0.2, 5)),
    party_boards={"train_parts": 400},
    party_methods=("flame", "fedavg"),
    csflow=False,
    sigmas=((0.1, "relative"), (0.3, "relative"), (1.0, "relative"), (3.0, "relative"), (0.015, "absolute")),
    epochs=(1, 3, 10),
)
"""Two cores, minutes: Lite0, 64 x 64 images, one epoch a round, default training."""

PAPER = Scale(
    backbones=("resnet18", "wide_resnet50_2", "efficientnet_b5"),
    textures=tuple(printed.TEXTURES),
    fleet_textures=tuple(printed.TEXTURES),
    boards={"train_parts": 390, "test_good_parts": 30, "test_defective_parts": 30, "photos": 1, "image_size": 288},
    tiles={},
    learning={"preset": "paper", "input": input_of(288)},
    tile_learning={"preset": "paper", "input": input_of(224)},
    fleet={"rounds": 110},
    sites=10,
    parties=((50, 1.0, 100), (50, 1.0, 200), (100, 0.2, 300), (100, 1.0, 500)),
    party_boards={},
    party_methods=(),
    csflow=True,
    sigmas=tuple((value, "absolute") for value in (0.005, 0.01, 0.015, 0.05, 0.1)),
    epochs=(1, 5, 10, 20, 50),
)
"""A GPU with the weights at hand: sizes and settings of the paper, where it gives them; it does not say how many sites
Tables 2 to 4 have. Its tiles are 225 x 225; the input must be a multiple of 32."""

SCALES = {"small": SMALL, "paper": PAPER}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One entry of a table: a run for every seed.

    Attributes:
        row, column: its place in the table.
        run: by seed.
        label: the defect class whose figures are shown; None for the overall ones.
        paper: the figures that the paper prints.
    """

    row: str
    column: str
    run: Callable[[int], Run]
    label: str | None = None
    paper: str | None = None


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A table or a figure.

    Attributes:
        baselines: columns that the others are compared with.
        plot: ``sweep``: AUROC over the columns; ``losses``: training loss over the rounds.
        notes: below the table.
    """

    title: str
    cells: tuple[Cell, ...]
    baselines: tuple[str, ...] = ()
    plot: str | None = None
    notes: tuple[str, ...] = field(default=())

    def runs(self) -> Iterator[Run]:
        """Every run, once for every seed; the first seed of all cells first."""
        for seed in SEEDS:
            for cell in self.cells:
                yield cell.run(seed)


class Recipes:
    """Makes runs of settings.

    Args:
        scale: the size of the experiments.
        tiles: the magnetic tiles' folder; None if it is missing.
    """

    def __init__(self, scale: Scale, tiles: Path | None) -> None:
        self.scale = scale
        self.tiles = tiles
        self.methods = [*(m for m in FEDERATED_METHODS if m in printed.METHODS), "solo"]
        """The paper's methods that EdgeFlame has, in the registry's order."""

    def boards(
        self, texture: str, method: str, *, sites: int | None = None, peer: str | None = None, **more: Any
    ) -> Callable[[int], Run]:
        """Runs of a fleet whose sites inspect one texture; with a method that needs no fleet each site learns alone."""

        def run(seed: int) -> Run:
            data = {"kind": "boards", "textures": [texture], "seed": seed, **self.scale.boards}
            return Run(simulation=self._simulation(seed, data, self.scale.learning, method, sites, more), peer=peer)

        return run

    def magnetic(
        self, method: str, *, sites: int | None = None, peer: str | None = None, **more: Any
    ) -> Callable[[int], Run]:
        """The same on the magnetic tiles."""

        def run(seed: int) -> Run:
            data = {"kind": "folder", "path": str(self.tiles), **self.scale.tiles}
            learning = self.scale.tile_learning
            return Run(simulation=self._simulation(seed, data, learning, method, sites, more), peer=peer)

        return run

    def _simulation(
        self, seed: int, data: Settings, learning: Settings, method: str, sites: int | None, more: Settings
    ) -> Settings:
        base: Settings = {
            "sites": sites or self.scale.sites,
            "seed": seed,
            "data": data,
            "evaluation": {"every": 0, "sites": False},
            "fleet": {**self.scale.fleet, "seed": seed, "learning": {**learning, "seed": seed}},
        }
        if METHODS[method].alone:
            base["alone"] = method
        else:
            base["fleet"]["learning"]["method"] = method
        return merge_settings(base, more)


def backbone(name: str) -> Settings:
    return {"fleet": {"learning": {"backbone": {"name": name}}}}


def training(**settings: Any) -> Settings:
    return {"fleet": {"learning": {"training": settings}}}


def weight(mu: float) -> Settings:
    """Settings of the distillation's weight; empty for the default, so that other tables' runs are used."""
    return {} if mu == Training().distillation_weight else training(distillation_weight=mu)


def epochs_of(epochs: int) -> Settings:
    """Settings of the number of epochs; empty for the default, as in :func:`weight`."""
    return {} if epochs == Training().epochs else training(epochs=epochs)


def experiments(recipes: Recipes) -> dict[str, Experiment]:
    """All experiments that can be run here, by the name the command line uses."""
    found = {
        "table1": table1(recipes),
        "table2": table2(recipes),
        "table4": table4(recipes),
        "table5": table5(recipes),
        "fig9": fig9(recipes),
        "fig10": fig10(recipes),
        "fig11": fig11(recipes),
        "fig12": fig12(recipes),
        "fig14": fig14(recipes),
    }
    if recipes.tiles is not None:
        found["table3"] = table3(recipes)
        found["pooled"] = pooled(recipes)
    return found


def table1(recipes: Recipes) -> Experiment:
    cells = []
    scale = recipes.scale
    for texture in scale.textures:
        short = printed.TEXTURES[texture]
        for name in scale.backbones:
            # What stands beside a backbone that the paper does not have.
            theirs = name if ("wwg", f"fade:{name}") in printed.TABLE1 else "resnet18"
            suffix = f" {name}" if len(scale.backbones) > 1 else ""
            common = {**backbone(name)}
            for method in ("none", "fade"):
                paper = printed.TABLE1.get((short, f"{method}:{theirs}"))
                run = recipes.boards(texture, method, sites=1, **common)
                cells.append(Cell(row=short, column=f"{method}{suffix}", run=run, paper=paper))
            run = recipes.boards(texture, "none", sites=1, peer="padim", **common)
            paper = printed.TABLE1[short, f"padim:{theirs}"]
            cells.append(Cell(row=short, column=f"padim{suffix}", run=run, paper=paper))
        for peer in PEERS[1:] if scale.csflow else PEERS[1:2]:
            # The paper does not say which backbone its PatchCore has.
            run = recipes.boards(texture, "none", sites=1, peer=peer, **backbone(scale.backbones[0]))
            cells.append(Cell(row=short, column=peer, run=run, paper=printed.TABLE1[short, peer]))
    notes = ["`none` is the untrained backbone with low-rank Gaussian statistics; PaDiM and PatchCore are anomalib's."]
    if not scale.csflow:
        notes.append("CS-Flow downloads its weights: `--scale paper` runs it, where a network is.")
    return Experiment(
        title="Table 1: FADE and others, one site, boards", cells=tuple(cells), baselines=("none",), notes=tuple(notes)
    )


def table2(recipes: Recipes) -> Experiment:
    cells = []
    scale = recipes.scale
    for name in scale.backbones:
        theirs = printed.TABLE2.get(name, printed.TABLE2["resnet18"])
        suffix = f" {name}" if len(scale.backbones) > 1 else ""
        for texture in scale.fleet_textures:
            short = printed.TEXTURES[texture]
            run = recipes.boards(texture, "none", sites=1, **backbone(name))
            cells.append(Cell(row=f"{short}{suffix}", column="none", run=run))
            for method in recipes.methods:
                run = recipes.boards(texture, method, **backbone(name))
                paper = theirs.get((short, method))
                cells.append(Cell(row=f"{short}{suffix}", column=method, run=run, paper=paper))
    return Experiment(
        title="Table 2: federated methods, boards",
        cells=tuple(cells),
        baselines=("none", "fedavg"),
        notes=(SOLO_NOTE,),
    )


SOLO_NOTE = (
    "SOLO's figures are means over sites, each with statistics of its own few images; the other methods' statistics "
    "are of all sites' images, as pooling their moments gives."
)


def table3(recipes: Recipes) -> Experiment:
    cells = []
    for name in recipes.scale.backbones:
        theirs = name if ("crack", f"fade:{name}") in printed.TABLE3 else "resnet18"
        suffix = f" {name}" if len(recipes.scale.backbones) > 1 else ""
        for label in ("blowhole", "break", "crack", "fray", "uneven"):
            for column, run in (
                ("none", recipes.magnetic("none", sites=1, **backbone(name))),
                ("fade", recipes.magnetic("fade", sites=1, **backbone(name))),
                ("flame", recipes.magnetic("flame", **backbone(name))),
                ("padim", recipes.magnetic("none", sites=1, peer="padim", **backbone(name))),
                ("patchcore", recipes.magnetic("none", sites=1, peer="patchcore", **backbone(name))),
            ):
                paper = printed.TABLE3.get((label, f"{column}:{theirs}"))
                cells.append(Cell(row=label, column=f"{column}{suffix}", run=run, label=label, paper=paper))
    return Experiment(
        title="Table 3: magnetic tiles, a class's images against the good ones",
        cells=tuple(cells),
        baselines=("none",),
    )


def pooled(recipes: Recipes) -> Experiment:
    return Experiment(
        title="FLAME over five sites against training on the pooled images, magnetic tiles",
        cells=tuple(
            Cell(row="tiles", column=column, run=run)
            for column, run in (
                ("pooled", recipes.magnetic("fade", sites=1)),
                ("none", recipes.magnetic("none", sites=1)),
                ("flame", recipes.magnetic("flame", sites=5)),
                ("fedavg", recipes.magnetic("fedavg", sites=5)),
            )
        ),
        baselines=("pooled", "none"),
        notes=(
            "`pooled` is FADE on all the images at one place, for as many epochs as the rounds have in all.",
            "The goal is a difference below 1 percentage point (0.01).",
        ),
    )


def table4(recipes: Recipes) -> Experiment:
    texture = recipes.scale.fleet_textures[0]
    cells = []
    for beta in ("0.1", "0.5", "5.0"):
        # 0.5 is the default: those runs are Table 2's.
        more: Settings = {} if beta == "0.5" else {"partition": {"beta": float(beta)}}
        row = f"beta {beta}"
        cells.append(Cell(row=row, column="none", run=recipes.boards(texture, "none", sites=1)))
        for method in recipes.methods:
            run = recipes.boards(texture, method, **more)
            cells.append(Cell(row=row, column=method, run=run, paper=printed.TABLE4.get((beta, method))))
    return Experiment(
        title=f"Table 4: heterogeneity, {printed.TEXTURES[texture]} (the paper: averages)",
        cells=tuple(cells),
        baselines=("none", "fedavg"),
        notes=(SOLO_NOTE,),
    )


def table5(recipes: Recipes) -> Experiment:
    scale, texture = recipes.scale, recipes.scale.fleet_textures[0]
    cells = []
    for sites, sampling, rounds in scale.parties:
        row = f"{sites} sites, {sampling:.0%} sampled, {rounds} rounds"
        # At the small scale the shortest of the paper's stands beside ours.
        shortest = {50: 100, 100: 300}[sites] if scale.party_methods else rounds
        paper = f"{sites},{shortest}-rounds"
        more = {"data": scale.party_boards, "fleet": {"rounds": rounds, "fraction_train": sampling}}
        cells.append(
            Cell(row=row, column="none", run=recipes.boards(texture, "none", sites=1, data=scale.party_boards))
        )
        for method in scale.party_methods or recipes.methods:
            run = recipes.boards(texture, method, sites=sites, **more)
            cells.append(Cell(row=row, column=method, run=run, paper=printed.TABLE5.get((paper, method))))
    return Experiment(
        title=f"Table 5: many sites, {printed.TEXTURES[texture]} (the paper: averages)",
        cells=tuple(cells),
        baselines=("none", "fedavg"),
    )


def fig9(recipes: Recipes) -> Experiment:
    texture = recipes.scale.fleet_textures[0]
    cells = [Cell(row="fade", column="none", run=recipes.boards(texture, "none", sites=1))]
    for value, unit in recipes.scale.sigmas:
        run = recipes.boards(texture, "fade", sites=1, **training(noise_std=value, noise_scale=unit))
        cells.append(Cell(row="fade", column=f"{value:g} {unit}", run=run))
    return Experiment(
        title="Fig. 9: the noise's standard deviation sigma (FADE at one site)",
        cells=tuple(cells),
        baselines=("none",),
        plot="sweep",
        notes=(
            "Relative: in units of each channel's standard deviation. Absolute: as in the paper.",
            printed.WORDS["fig9"],
        ),
    )


def fig10(recipes: Recipes) -> Experiment:
    texture = recipes.scale.fleet_textures[0]
    return Experiment(
        title="Fig. 10: the distillation's weight mu (FLAME)",
        cells=tuple(
            Cell(
                row="flame", column=f"{mu:g}", run=recipes.boards(texture, "flame", **training(distillation_weight=mu))
            )
            for mu in (0.1, 0.5, 1.0, 2.0, 5.0)
        ),
        plot="sweep",
        notes=(printed.WORDS["fig10"],),
    )


def fig11(recipes: Recipes) -> Experiment:
    texture = recipes.scale.fleet_textures[0]
    cells = []
    for beta in (0.1, 0.5, 5.0):
        more: Settings = {} if beta == 0.5 else {"partition": {"beta": beta}}
        cells += [
            Cell(row=f"beta {beta:g}", column=method, run=recipes.boards(texture, method, **more))
            for method in ("flame", "fedavg", "scaffold")
        ]
    return Experiment(
        title="Fig. 11: training loss and heterogeneity",
        cells=tuple(cells),
        plot="losses",
        notes=(printed.WORDS["fig11"], "FLAME's loss has a term that the others' have not."),
    )


def fig12(recipes: Recipes) -> Experiment:
    texture = recipes.scale.fleet_textures[0]
    return Experiment(
        title="Fig. 12: share of the sites sampled in a round (FLAME)",
        cells=tuple(
            Cell(
                row="flame",
                column=f"{share:g}",
                run=recipes.boards(texture, "flame", **({} if share == 1.0 else {"fleet": {"fraction_train": share}})),
            )
            for share in (1.0, 0.5, 0.2)
        ),
        plot="sweep",
        notes=(printed.WORDS["fig12"],),
    )


def fig14(recipes: Recipes) -> Experiment:
    texture = recipes.scale.fleet_textures[0]
    return Experiment(
        title="Fig. 14: local epochs in a round (FLAME)",
        cells=tuple(
            Cell(row="flame", column=f"{epochs}", run=recipes.boards(texture, "flame", **epochs_of(epochs)))
            for epochs in recipes.scale.epochs
        ),
        plot="sweep",
        notes=(printed.WORDS["fig14"],),
    )
