"""Corrects the contact frames of a capsule on a plane in mujoco-warp 4.0.

MuJoCo aligns the friction directions of such a contact with the capsule's axis, at any inclination of the capsule.
mujoco-warp does so only for inclinations below 60 degrees, because it compares the length of the projected axis with
1/2, where MuJoCo compares that of the axis. With MuJoCo's pyramidal friction cones the directions matter: the
accelerations of Ant differ by up to 12%.
"""

# pyright does not know warp's kernel types, in which vectors have entries and functions have their source
# pyright: reportIndexIssue=false, reportFunctionMemberAccess=false, reportCallIssue=false, reportArgumentType=false

# warp reads the source of kernels and evaluates their annotations, so annotations are not postponed here

import inspect

import warp as wp
from mujoco_warp._src import collision_primitive

_WRONG_COMPARISON = "if b_norm < 0.5:"
_plane_capsule = collision_primitive.plane_capsule


@wp.func
def _aligned_plane_capsule(  # noqa: ANN202 (warp infers it)
    normal: wp.vec3,
    plane_position: wp.vec3,
    position: wp.vec3,
    axis: wp.vec3,
    radius: float,
    half_length: float,
):
    """Compute mujoco-warp's contacts, with the frame along the capsule unless the capsule is exactly upright."""
    distances, positions, frame = _plane_capsule(normal, plane_position, position, axis, radius, half_length)
    along = axis - normal * wp.dot(normal, axis)
    length = wp.length(along)
    if length > 1.0e-6:
        tangent = along / length
        side = wp.cross(normal, tangent)
        frame = wp.mat33(normal[0], normal[1], normal[2], tangent[0], tangent[1], tangent[2], side[0], side[1], side[2])
    return distances, positions, frame


def needs_correction() -> bool:
    """Return whether mujoco-warp's own function still has the bug."""
    return _WRONG_COMPARISON in inspect.getsource(_plane_capsule.func)


def correct_plane_capsule() -> None:
    """Install the correction, before any model is compiled; do nothing if mujoco-warp does not need it."""
    if needs_correction():
        collision_primitive.plane_capsule = _aligned_plane_capsule
