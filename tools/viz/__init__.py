"""Pictures of graphs: a page that needs no server, SVG, DOT and JSON."""

from fxopt.tools.viz.from_fx import fx_graph
from fxopt.tools.viz.from_onnx import onnx_graph
from fxopt.tools.viz.model import Edge, Graph, Node, Overlay, Weight
from fxopt.tools.viz.view import FORMATS, view

__all__ = ["FORMATS", "Edge", "Graph", "Node", "Overlay", "Weight", "fx_graph", "onnx_graph", "view"]
