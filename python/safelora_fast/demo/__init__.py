"""The whole job on a real 135M model: fine-tune narrowly, project or defend, and compare what that prevents and costs."""
