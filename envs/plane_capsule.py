"""Corrects the contact frames that mujoco-warp 4.0 gives a capsule on a plane.

MuJoCo turns the friction directions of such a contact along the capsule's axis, however steep the capsule stands.
mujoco-warp does so only for capsules less than 60 degrees steep, because it compares the length of the axis's projection
with 1/2 where MuJoCo compares that of the axis. With MuJoCo's pyramidal friction cones the directions matter: the
accelerations of Ant differ by up to 12 %.
"""

# warp's types are those of its kernels, where vectors have entries and functions their source
# pyright: reportIndexIssue=false, reportFunctionMemberAccess=false, reportCallIssue=false, reportArgumentType=false

# warp reads the source of what it compiles and evaluates its annotations, so they are not postponed here

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
    """What mujoco-warp computes, with the frame along the capsule unless that is upright to the last digits."""
    distances, positions, frame = _plane_capsule(normal, plane_position, position, axis, radius, half_length)
    along = axis - normal * wp.dot(normal, axis)
    length = wp.length(along)
    if length > 1.0e-6:
        tangent = along / length
        side = wp.cross(normal, tangent)
        frame = wp.mat33(normal[0], normal[1], normal[2], tangent[0], tangent[1], tangent[2], side[0], side[1], side[2])
    return distances, positions, frame


def needs_correction() -> bool:
    """Whether mujoco-warp's own function still has the fault."""
    return _WRONG_COMPARISON in inspect.getsource(_plane_capsule.func)


def correct_plane_capsule() -> None:
    """Put the correction in place, before any model is compiled; does nothing where mujoco-warp needs none."""
    if needs_correction():
        collision_primitive.plane_capsule = _aligned_plane_capsule
