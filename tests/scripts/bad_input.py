"""What users do wrong: name: (script, overrides, what the one line must say).

TEACHER, STUDENT and TRUNCATED stand for files of tiny models, TEXT for a file that holds a few words, EMPTY for an
empty folder and OTHER for a folder with a file that is not a run's.
"""

TRAIN = ["experiment=none", "data=digits"]

CASES = {
    # presets and settings
    "preset": ("train_teacher", ["experiment=nope"], ["nope", "digits/teacher"]),
    "preset of stage 1": ("distill_guidance", ["experiment=nope"], ["nope", "digits/stage1"]),
    "preset of stage 2": ("distill_steps", ["experiment=nope"], ["nope", "digits/stage2"]),
    "preset of a learned solver": ("train_amed", ["experiment=nope"], ["nope", "digits/amed_5nfe"]),
    "table": ("reproduce", ["table=nope"], ["nope", "digits_students"]),
    "no table": ("reproduce", [], ["table"]),
    "unknown setting": ("train_teacher", ["trainr.updates=3"], ["trainr"]),
    "unknown setting of sampling": ("sample", ["num_smaples=3"], ["num_smaples"]),
    "no such form of override": ("sample", ["num_samples"], ["num_samples"]),
    "missing setting": ("make_reference", ["out=OUT"], ["features"]),
    # the trainer
    "updates": ("train_teacher", ["trainer.updates=-3"], ["updates", "-3", "positive"]),
    "unknown setting of the trainer": ("train_teacher", ["+trainer.lr=1"], ["'lr'", "learning_rate"]),
    "batch_size": ("train_teacher", ["trainer.batch_size=0"], ["batch_size", "0", "positive integer"]),
    "batch that does not divide": (
        "train_teacher",
        ["trainer.batch_size=10", "trainer.accumulation=4"],
        ["batch_size=10", "accumulation=4"],
    ),
    "learning rate": ("train_teacher", ["trainer.learning_rate=fast"], ["'fast'", "positive number"]),
    "optimiser": ("train_teacher", ["trainer.optimizer=adma"], ["'adma'", "adam, adamw, sgd"]),
    "decay": ("train_teacher", ["trainer.decay=step"], ["'step'", "cosine"]),
    "precision": ("train_teacher", ["trainer.precision=fp16"], ["'fp16'", "fp32, bf16"]),
    "clip": ("train_teacher", ["trainer.clip=-1"], ["clip", "-1", "positive"]),
    "channels_last": ("train_teacher", ["trainer.channels_last=maybe"], ["'maybe'", "true or false"]),
    "recompute": ("train_teacher", ["trainer.recompute=2"], ["recompute", "2", "true or false"]),
    "parallel": ("train_teacher", ["trainer.parallel=tp"], ["'tp'", "ddp, fsdp"]),
    "device of the trainer": ("train_teacher", ["trainer.device=tpu9"], ["'tpu9'", "cpu"]),
    # data
    "data": ("train_teacher", ["data=nope"], ["nope", "cifar10"]),
    "split": ("train_teacher", ["data.split=half"], ["half", "train"]),
    "missing folder": ("train_teacher", ["experiment=none", "data=images", "data.root=/nowhere"], ["/nowhere"]),
    "empty folder": ("train_teacher", ["experiment=none", "data=images", "data.root=EMPTY"], ["no images", "empty"]),
    "data of another shape": (
        "distill_guidance",
        ["experiment=none", "teacher=TEACHER", "data=shapes"],
        ["[3, 32, 32]", "[1, 8, 8]"],
    ),
    # teachers and objectives
    "weighting": ("distill_guidance", ["teacher=TEACHER", "weighting=nope"], ["nope", "truncated_snr"]),
    "weighting of a teacher": ("train_teacher", ["weighting=nope"], ["nope", "edm"]),
    "noise levels": ("train_teacher", ["noise_levels=nope"], ["nope", "lognormal"]),
    "label dropout": ("train_teacher", ["label_dropout=1.5"], ["label_dropout", "1.5", "[0, 1]"]),
    "network": ("train_teacher", ["model.network.name=nope"], ["nope", "song_unet"]),
    "teacher": ("distill_guidance", ["teacher=nope"], ["nope", "digits-teacher"]),
    "teacher that is text": ("distill_guidance", ["teacher=TEXT"], ["text.safetensors"]),
    "range of w": ("distill_guidance", ["teacher=TEACHER", "w=[4,0]"], ["(4", "least, greatest"]),
    "a student as the teacher of stage 1": ("distill_guidance", ["teacher=STUDENT"], ["guidance weight already"]),
    "start_steps": ("distill_steps", ["teacher=STUDENT", "start_steps=12"], ["12", "power of two"]),
    "sampler": ("distill_steps", ["teacher=STUDENT", "sampler=nope"], ["nope", "stochastic"]),
    "stage": (
        "distill_steps",
        ["teacher=STUDENT", "start_steps=8", "experiment=none", "trainer.batch_size=8", "+stages.5.updates=3"],
        ["5", "4, 2, 1"],
    ),
    "nothing to compare": ("compare_solvers", ["evaluations=[]"], ["evaluations", "at least one"]),
    "last_steps": ("distill_steps", ["teacher=STUDENT", "start_steps=8", "last_steps=8"], ["last_steps", "8", "4"]),
    "noise of an autoencoder": ("train_autoencoder", ["noise=-1", "data.size=10"], ["noise", "-1"]),
    "sides of an autoencoder": ("train_autoencoder", ["data.resolution=30", "data.size=10"], ["multiples of 4", "30"]),
    "nothing to encode": ("cache_latents", ["model=TEACHER"], ["data=shapes", "images=FOLDER"]),
    "no autoencoder to encode with": ("cache_latents", ["model=TEACHER", "data=shapes"], ["holds no autoencoder"]),
    "another file than the preset's": (
        "train_amed",
        ["model=TEACHER", "sha256=0123456789abcdef01"],
        ["SHA-256", "config says 0123456789abcdef..."],
    ),
    "form of a learned solver": ("train_amed", ["form=nope"], ["nope", "plugin"]),
    "objective of a learned solver": ("train_amed", ["objective.name=nope"], ["nope", "stepwise"]),
    # runs
    "folder of something else": ("train_teacher", ["out=OTHER"], ["thesis.tex", "new folder"]),
    "a file as the folder": ("train_teacher", ["out=TEXT"], ["is a file"]),
    # sampling
    "model": ("sample", ["model=nope"], ["nope", "digits-teacher"]),
    "truncated model": ("sample", ["model=TRUNCATED"], ["truncated.safetensors"]),
    "num_steps of a student": ("sample", ["model=STUDENT", "num_steps=3"], ["3", "2 steps"]),
    "no num_steps": ("sample", ["model=TEACHER"], ["num_steps"]),
    "solver of a student": ("sample", ["model=STUDENT", "solver=heun"], ["solver"]),
    "class label": ("sample", ["model=STUDENT", "labels=[12]"], ["12", "0 to 9"]),
    "solver": ("sample", ["model=TEACHER", "solver=nope"], ["nope", "heun"]),
    "solver option": ("sample", ["model=TEACHER", "num_steps=4", "solver=dpmpp", "solver.order=7"], ["7"]),
    "output": ("sample", ["model=STUDENT", "save=gif"], ["gif", "npz"]),
    "device": ("sample", ["model=STUDENT", "device=tpu9"], ["tpu9"]),
    "an encoder that shall sample": ("sample", ["model=digits-encoder-4"], ["images to noise", "editing"]),
    "precision of sampling": ("sample", ["model=STUDENT", "precision=fp8"], ["fp8", "bf16"]),
    "graphs without a GPU": (
        "sample",
        ["model=STUDENT", "device=cpu", "cuda_graph=true"],
        ["CUDA graphs need", "cpu", "cuda_graph=false"],
    ),
    "compile": ("sample", ["model=STUDENT", "compile=maybe"], ["compile", "'maybe'", "true or false"]),
    "predictor": ("sample", ["model=TEACHER", "solver=learned", "solver.predictor=nope"], ["nope"]),
    "start of a student": ("sample", ["model=STUDENT", "start=3"], ["leave out", "start"]),
    "start without statistics": ("sample", ["model=TEACHER", "num_steps=3", "start=3"], ["gaussian_stats.py", "no "]),
    "start outside the range": (
        "sample",
        ["model=digits-teacher", "num_steps=3", "start=99"],
        ["99", "0.002 to 80"],
    ),
    "entry of a start": ("sample", ["model=TEACHER", "num_steps=3", "start={level:3}"], ["sigma and statistics"]),
    "statistics of a shipped model": ("gaussian_stats", ["beside=true"], ["digits-teacher", "leave out beside"]),
    # editing
    "task": ("edit", ["task=colourise"], ["colourise", "style_transfer"]),
    "strength": ("edit", ["task=style_transfer", "strength=2", "encoder.num_steps=1"], ["strength", "2", "[0, 1]"]),
    "a student that shall encode": (
        "edit",
        ["task=style_transfer", "encoder.model=STUDENT"],
        ["cannot encode", "sampler=encoder"],
    ),
    "data of an edit": ("edit", ["data=shapes"], ["[3, 32, 32]", "[1, 8, 8]"]),
    # evaluation, conversion
    "nothing to measure": ("evaluate", [], ["samples=PATH", "model=NAME"]),
    "a switch": ("evaluate", ["model=STUDENT", "compile=maybe"], ["compile", "true or false", "maybe"]),
    "a switch of a table": ("reproduce", ["table=digits_students", "out=/nowhere", "compile=1"], ["compile", "1"]),
    "samples that are not there": ("evaluate", ["samples=/nowhere.npz"], ["/nowhere.npz"]),
    "measure": ("evaluate", ["samples=EMPTY", "measures=[fdi]"], ["'fdi'", "inception_score"]),
    "features": ("make_reference", ["features=nope", "out=OUT"], ["nope", "digits_classifier"]),
    "file to convert": ("convert", ["source=/nowhere.pkl", "dest=OUT"], ["/nowhere.pkl"]),
    "text to convert": ("convert", ["source=TEXT", "dest=OUT"], ["text.safetensors"]),
}
