"""The demo on a real 135M model: fine-tune on a narrow task, project or defend, and compare effects and costs."""
