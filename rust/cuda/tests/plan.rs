//! How grouped products are cut.

#![allow(clippy::expect_used, reason = "tests")]

use safelora_fast_cuda::Dtype;
use safelora_fast_cuda::subspace_projection::{Form, Kind, Operand, Plan};

fn operand(shape: (usize, usize), rank: usize) -> Operand {
    let (_, columns) = shape;
    Operand { aligned: 64, base: 128, aligned_stride: columns, base_stride: columns, shape, factor: 256, rank }
}

fn kind(form: Form) -> Kind {
    Kind { form, dtype: Dtype::Bf16, is_pair: true }
}

/// The integers of the table: eight of each module after its six addresses and strides, then the module of every block.
fn words(plan: &Plan, modules: usize) -> (Vec<[i32; 8]>, Vec<i32>) {
    let table = plan.table();
    let word = |at: usize| i32::from_ne_bytes(table[at..at + 4].try_into().expect("four bytes"));
    let of_module = |module: usize| std::array::from_fn(|index| word(module * 80 + 48 + index * 4));
    let owners = (modules * 80..table.len()).step_by(4).map(word).collect();
    ((0..modules).map(of_module).collect(), owners)
}

#[test]
fn every_tile_chunk_and_group_has_its_block() {
    let operands = [operand((300, 4096), 16), operand((4096, 300), 5)];
    let plan = Plan::new(kind(Form::Transposed), &operands).expect("a plan");
    let (modules, owners) = words(&plan, 2);
    // 256 columns a tile; so little work is cut into chunks of 128 rows.
    let [first, second] = modules[..] else { panic!("two modules") };
    assert_eq!(first, [300, 4096, 16, 1, 16, 3, 0, 0]);
    assert_eq!(second, [4096, 300, 5, 0, 2, 32, 48, 16]);
    let expected: Vec<i32> =
        [(0, 48), (1, 64), (0, 16), (1, 2)].iter().flat_map(|(module, count)| vec![*module; *count]).collect();
    assert_eq!(owners, expected);
    assert_eq!(plan.offsets(), [0, 4096 * 16]);
    assert_eq!(plan.results(), 4096 * 16 + 300 * 5);
    assert_eq!(plan.partial(), (48 + 64) * 256 * 16);
    assert_eq!(plan.partial_squares(), (48 + 64) * 4);
}

#[test]
fn much_work_is_not_cut_along_the_contraction() {
    let operands = vec![operand((4096, 4096), 16); 196];
    for (form, tiles) in [(Form::Transposed, 16), (Form::Straight, 32)] {
        let plan = Plan::new(kind(form), &operands).expect("a plan");
        let (modules, owners) = words(&plan, operands.len());
        assert!(modules.iter().all(|module| module[4..6] == [tiles, 1]));
        assert_eq!(owners.len(), 196 * tiles as usize);
        assert_eq!(plan.partial(), 0);
    }
}

#[test]
fn wide_factors_are_cut_into_groups_and_results_start_where_four_floats_may() {
    let operands = [operand((8, 3), 70), operand((8, 3), 70)];
    let plan = Plan::new(kind(Form::Transposed), &operands).expect("a plan");
    let (modules, owners) = words(&plan, 2);
    assert_eq!((modules[1][6], owners.len()), (3, 6)); // groups of 32
    assert_eq!(plan.offsets(), [0, 212]);
}
