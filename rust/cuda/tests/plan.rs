//! Tests of how grouped products are divided.

#![allow(clippy::expect_used, reason = "tests")]

use safelora_fast_cuda::Dtype;
use std::convert::Infallible;
use std::sync::Arc;

use safelora_fast_cuda::subspace_projection::{Form, Kind, Operand, Plan, Plans, Request};

fn operand(shape: (usize, usize), rank: usize) -> Operand {
    let (_, columns) = shape;
    Operand {
        aligned: 64,
        base: 128,
        aligned_stride: columns,
        base_stride: columns,
        shape,
        factor: 256,
        rank,
        result: 0,
    }
}

fn kind(form: Form) -> Kind {
    Kind { form, dtype: Dtype::Bf16, is_pair: true }
}

fn plan(form: Form, operands: &[Operand]) -> Plan {
    let modules: Vec<_> = operands.iter().map(|operand| (kind(form), *operand)).collect();
    Plan::new(&modules).expect("a plan")
}

/// The integers of the table: eight per module, after its six addresses and strides, then the module of every block.
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
    let plan = plan(Form::Transposed, &operands);
    let (modules, owners) = words(&plan, 2);
    // 256 columns per tile; with so little work, chunks have 128 rows.
    let [first, second] = modules[..] else { panic!("two modules") };
    assert_eq!(first, [300, 4096, 16, 1, 16, 3, 0, 0]);
    assert_eq!(second, [4096, 300, 5, 0, 2, 32, 48, 16]);
    let mut expected: Vec<i32> =
        [(0, 48), (1, 64), (0, 16), (1, 2)].iter().flat_map(|(module, count)| vec![*module; *count]).collect();
    expected.resize(expected.len().next_multiple_of(4), 0);
    assert_eq!(owners, expected);
    assert_eq!(plan.places(), [(0, 0), (4096 * 16, 1)]);
    assert_eq!(plan.results(), 4096 * 16 + 300 * 5);
    assert_eq!(plan.partial(), (48 + 64) * 256 * 16);
    assert_eq!(plan.partial_squares(), (48 + 64) * 4);
}

#[test]
fn much_work_is_not_cut_along_the_contraction() {
    let operands = vec![operand((4096, 4096), 16); 196];
    for (form, tiles) in [(Form::Transposed, 16), (Form::Straight, 32)] {
        let plan = plan(form, &operands);
        let (modules, owners) = words(&plan, operands.len());
        assert!(modules.iter().all(|module| module[4..6] == [tiles, 1]));
        assert_eq!(owners.len(), 196 * tiles as usize);
        assert_eq!(plan.partial(), 0);
    }
}

#[test]
fn wide_factors_are_cut_into_groups_and_results_start_where_four_floats_may() {
    let operands = [operand((8, 3), 70), operand((8, 3), 70)];
    let plan = plan(Form::Transposed, &operands);
    let (modules, owners) = words(&plan, 2);
    assert_eq!((modules[1][6], owners.len()), (3, 8)); // groups of 32; the table ends at a multiple of 16 bytes
    assert_eq!(plan.places(), [(0, 0), (212, 1)]);
}

#[test]
fn modules_of_several_kinds_have_a_launch_each_and_one_table() {
    let wide = Kind { is_pair: false, ..kind(Form::Straight) };
    let modules = [
        (kind(Form::Transposed), operand((8, 3), 70)),
        (wide, operand((40, 8), 4)),
        (kind(Form::Transposed), operand((8, 5), 2)),
    ];
    let plan = Plan::new(&modules).expect("a plan");
    // Those of the first kind come first.
    assert_eq!(plan.places(), [(0, 0), (212 + 12, 2), (212, 1)]);
    assert_eq!(plan.results(), 212 + 12 + 160);
    assert_eq!(plan.table().len(), (2 * 80 + (3 + 1) * 4) + (80 + 4_usize.next_multiple_of(16)));
    assert!(Plan::new(&[]).expect_err("nothing").to_string().contains("nothing to multiply"));
}

#[test]
fn operands_that_no_kernel_can_take() {
    let good = operand((4, 4), 4);
    let cases = [
        (Operand { factor: 24, ..good }, "a multiple of 16 bytes"),
        (Operand { rank: 0, ..good }, "a factor of 0 columns"),
        (Operand { result: 40, ..good }, "a result at 0x28"),
        (Operand { shape: (1 << 40, 4), ..good }, "more than a kernel can count"),
    ];
    for (operand, message) in cases {
        let error = Plan::new(&[(kind(Form::Straight), operand)]).expect_err(message).to_string();
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn results_may_have_addresses_of_their_own() {
    let operands = [operand((8, 3), 2), operand((8, 3), 2)];
    let [first, second] = operands;
    let plan = plan(Form::Straight, &[Operand { result: 4096, ..first }, Operand { result: 1024, ..second }]);
    assert_eq!(plan.places(), [((4096 - 1024) / 4, 0), (0, 1)]);
    let modules = [(kind(Form::Straight), first), (kind(Form::Straight), Operand { result: 1024, ..second })];
    assert!(Plan::new(&modules).expect_err("one address").to_string().contains("all or none"));
}

fn request(stream: usize, rank: usize) -> Request {
    Request { place: (0, stream), modules: vec![(kind(Form::Transposed), operand((8, 3), rank))] }
}

fn find(plans: &mut Plans<usize>, request: Request, is_captured: bool) -> Arc<usize> {
    plans.find(request, is_captured, |request| Ok::<_, Infallible>(request.place.1)).expect("a plan")
}

#[test]
fn a_plan_is_of_one_stream_and_those_used_last_are_kept() {
    let mut plans = Plans::default();
    let first = find(&mut plans, request(1, 1), false);
    assert!(!Arc::ptr_eq(&first, &find(&mut plans, request(2, 1), false)));
    for rank in 2..Plans::<usize>::MOST {
        find(&mut plans, request(1, rank), false);
        assert!(Arc::ptr_eq(&first, &find(&mut plans, request(1, 1), false)));
    }
    find(&mut plans, request(1, 100), false);
    assert_eq!(plans.counts(), [Plans::<usize>::MOST, 0]);
    assert!(Arc::ptr_eq(&first, &find(&mut plans, request(1, 1), false)));
}

#[test]
fn a_graph_keeps_what_it_reads() {
    let mut plans = Plans::default();
    let first = find(&mut plans, request(1, 1), false);
    // The capture has its own stream, and reuses the earlier upload.
    assert!(Arc::ptr_eq(&first, &find(&mut plans, request(2, 1), true)));
    assert_eq!(plans.counts(), [2, 1]);
    assert!(Arc::ptr_eq(&first, &find(&mut plans, request(2, 1), true)));
    assert_eq!(plans.counts(), [2, 1]); // kept once, however many captures read it
    // Nothing else can use what the graph itself uploads.
    let of_the_graph = find(&mut plans, request(2, 5), true);
    assert_eq!(plans.counts(), [2, 2]);
    assert!(!Arc::ptr_eq(&of_the_graph, &find(&mut plans, request(2, 5), false)));
}
