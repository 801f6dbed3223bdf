"""Denoisers: networks with their preconditioning, guidance, exact mixtures, and their files."""

from diffdistill.models.adm_unet import OpenAIUNet
from diffdistill.models.autoencoder import Autoencoder, build_autoencoder, load_autoencoder, save_autoencoder
from diffdistill.models.building import (
    NETWORKS,
    build_denoiser,
    flow_map_student,
    guidance_student,
    with_guidance_input,
)
from diffdistill.models.classifier import ClassifierGuidance, EncoderUNet, NoisyClassifier
from diffdistill.models.dhariwal_unet import DhariwalUNet
from diffdistill.models.guidance import (
    GUIDANCES,
    AutoGuidance,
    ClassifierFreeGuidance,
    GuidanceConditioned,
    ProjectedGuidance,
    RescaledGuidance,
    Wrapper,
    guided,
    make_guidance,
)
from diffdistill.models.loading import fingerprint, load_denoiser, save_denoiser
from diffdistill.models.mixture import GaussianMixture
from diffdistill.models.network import NetworkDenoiser
from diffdistill.models.own.registration import register_network
from diffdistill.models.own.wrapping import wrap
from diffdistill.models.preconditioning import PRECONDITIONINGS, Preconditioning, make_preconditioning
from diffdistill.models.song_unet import SongUNet

__all__ = [
    "GUIDANCES",
    "NETWORKS",
    "PRECONDITIONINGS",
    "AutoGuidance",
    "Autoencoder",
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "DhariwalUNet",
    "EncoderUNet",
    "GaussianMixture",
    "GuidanceConditioned",
    "NetworkDenoiser",
    "NoisyClassifier",
    "OpenAIUNet",
    "Preconditioning",
    "ProjectedGuidance",
    "RescaledGuidance",
    "SongUNet",
    "Wrapper",
    "build_autoencoder",
    "build_denoiser",
    "fingerprint",
    "flow_map_student",
    "guidance_student",
    "guided",
    "load_autoencoder",
    "load_denoiser",
    "make_guidance",
    "make_preconditioning",
    "register_network",
    "save_autoencoder",
    "save_denoiser",
    "with_guidance_input",
    "wrap",
]
