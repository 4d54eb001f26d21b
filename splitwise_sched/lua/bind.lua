-- bind: give each claimed request a decode instance with its KV reserved there, or tell that none has room.
--   KEYS     instance:<prefill>, queue, decode-load, counters
--   ARGV[2]  id of the prefill instance      [3] ms that the record of a request that ends here is kept
--   ARGV[4...] queue, its entry, request id, epoch; again for each claimed request, oldest first
--   returns  one {request id, verdict, decode instance, front end} a request. Verdicts: "BOUND"; "WAIT": claim kept, bind it again
--            later (so are all that follow it: none overtakes); "STALE": no longer this claim's, forget it
-- A mixed instance keeps what it claims as long as it has room. A decode instance to which transfers keep failing
-- (give_back.lua) is chosen only when there is no other.

local RETAIN, me = tonumber(ARGV[3]), ARGV[2]
local lease = redis.call('HMGET', KEYS[1], 'role', 'avoids_until_ms')
local role = lease[1]
if not role then return redis.error_reply('FENCED the lease of ' .. me .. ' has lapsed') end
local now = now_ms()
local avoids_some = number(lease[2]) > now

local function is_avoided(instance)
  local until_ms = redis.call('HGET', P .. 'pair:' .. me .. '|' .. instance, 'avoided_until_ms')
  return number(until_ms) > now
end

-- decode instances by id, as they are while this script runs: read once, written back at its end; false without a lease
local known = {}

local function decode_of(instance)
  if known[instance] == nil then
    local v = redis.call('HMGET', P .. 'instance:' .. instance, 'capacity_tokens', 'reserved_tokens', 'block_size',
                         'reserved_requests', 'capacity_requests')
    local capacity, block = number(v[1]), number(v[3])
    known[instance] = capacity > 0 and block > 0 and {capacity = capacity, reserved = number(v[2]), block = block,
                                requests = number(v[4]), max_requests = number(v[5]),
                                is_avoided = avoids_some and is_avoided(instance)} or false
  end
  return known[instance]
end

-- tokens to reserve on an instance when it has room, nil when not; second: whether it could never hold the input
local function fits(d, wanted, input)
  if not d or input + 1 > d.capacity then return nil, true end
  local tokens = math.min(math.ceil(wanted / d.block) * d.block, d.capacity)
  if d.reserved + tokens > d.capacity or d.requests >= d.max_requests then return nil, false end
  return tokens, false
end

local function pick(wanted, input)
  if role == 'mixed' and redis.call('ZSCORE', KEYS[3], me) then
    local tokens = fits(decode_of(me), wanted, input)
    if tokens then return me, tokens, false end
  end
  -- Nearly always the first has room.
  local offset, size, never, seen = 0, 1, true, false
  local avoided, avoided_tokens, has_other
  while true do
    local page = redis.call('ZRANGE', KEYS[3], offset, offset + size - 1)
    for _, candidate in ipairs(page) do
      local d = decode_of(candidate)
      if d then
        seen = true
        local tokens, too_small = fits(d, wanted, input)
        if tokens and not d.is_avoided then return candidate, tokens, false end
        if tokens and not avoided then avoided, avoided_tokens = candidate, tokens end
        has_other = has_other or not (too_small or d.is_avoided)
        never = never and too_small
      else
        redis.call('ZREM', KEYS[3], candidate)
        offset = offset - 1
      end
    end
    if #page < size then break end
    offset, size = offset + size, 16
  end
  if not has_other then return avoided, avoided_tokens, seen and never end
  return nil, nil, false
end

-- Claims that wait for room are spread over prefill instances, which ask again and again: whoever asks first would get it.
-- So the oldest of them says that it is, and nobody is bound who came much later. Who is gone says nothing any more.
--   oldest-claim  STRING that expires: <ms at which it was queued> <request id>
local SLACK_MS, SAID_MS = 100, 50
local oldest = redis.call('GET', P .. 'oldest-claim')
local oldest_ms, oldest_id = string.match(oldest or '', '^(%d+) (.+)$')

local function queued_ms(entry)
  return tonumber(string.match(entry, '^%d+'))
end

local function has_to_wait(id, entry)
  return oldest_id and oldest_id ~= id and tonumber(oldest_ms) + SLACK_MS < queued_ms(entry)
end

local function say_oldest(id, entry)
  if oldest_id and oldest_id ~= id and tonumber(oldest_ms) < queued_ms(entry) then return end
  oldest_ms, oldest_id = queued_ms(entry), id
  redis.call('SET', P .. 'oldest-claim', oldest_ms .. ' ' .. id, 'PX', SAID_MS)
end

local readers = {}
local function has_reader(frontend)
  if readers[frontend] == nil then readers[frontend] = redis.call('EXISTS', P .. 'out:' .. frontend) == 1 end
  return readers[frontend]
end

local result, full = {}, false
local num_bound, tokens_by_class, all_tokens = 0, {}, 0
for i = 4, #ARGV, 4 do
  local queue, entry, id, epoch = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local r = load(id)
  if r and r.state == 'prefill' and r.prefill == me and r.epoch == epoch and r.queue_entry == entry
     and r.queue == queue then
    -- The reply to an earlier call was lost on its way.
    result[#result + 1] = {id, 'BOUND', r.decode, r.frontend}
  elseif r and r.broken and is_live(r.state) then
    remove_entry({queue = queue, queue_entry = entry})
    terminate(id, r, 'failed', 'its record has a field that this version does not read: ' .. r.broken, RETAIN)
    result[#result + 1] = {id, 'STALE', '', ''}
  elseif not r or r.state ~= 'queued' or r.epoch ~= epoch or r.queue_entry ~= entry or r.queue ~= queue then
    remove_entry({queue = queue, queue_entry = entry})
    result[#result + 1] = {id, 'STALE', '', ''}
  elseif tonumber(r.deadline_ms) <= now then
    terminate(id, r, 'expired', 'its time was over before an instance had room for it', RETAIN)
    result[#result + 1] = {id, 'STALE', '', ''}
  elseif not has_reader(r.frontend) then
    -- Nobody would read its answer. A front end that only slept puts it back; else it expires.
    lose(id, r, me, 'its front end is gone')
    result[#result + 1] = {id, 'STALE', '', ''}
  elseif full or has_to_wait(id, entry) then
    full = true
    result[#result + 1] = {id, 'WAIT', '', ''}
  else
    local decode, tokens, never = pick(tonumber(r.kv_tokens), tonumber(r.input_tokens))
    if decode then
      local d = known[decode]
      d.reserved, d.requests, d.changed = d.reserved + tokens, d.requests + 1, true
      set_load(decode, d.reserved, d.capacity)
      local inbox_entry = redis.call('XADD', P .. 'inbox:' .. decode, '*', 'id', id, 'epoch', epoch, 'prefill', me,
                                       'frontend', r.frontend)
      redis.call('HSET', P .. 'request:' .. id, 'state', 'prefill', 'prefill', me, 'decode', decode,
                 'inbox_entry', inbox_entry, 'kv_reserved', tokens, 'claimed_ms', now, 'attempts', (r.attempts or 0) + 1)
      forget_preference(id, r)
      if oldest_id == id then
        oldest_id = nil
        redis.call('DEL', P .. 'oldest-claim')
      end
      num_bound, all_tokens = num_bound + 1, all_tokens + r.input_tokens
      tokens_by_class[r.class] = (tokens_by_class[r.class] or 0) + r.input_tokens
      result[#result + 1] = {id, 'BOUND', decode, r.frontend}
    elseif never then
      terminate(id, r, 'failed', 'no decode instance has a KV pool that holds its ' .. r.input_tokens .. ' input tokens',
                RETAIN)
      result[#result + 1] = {id, 'STALE', '', ''}
    else
      full = true
      say_oldest(id, entry)
      result[#result + 1] = {id, 'WAIT', '', ''}
    end
  end
end
for instance, d in pairs(known) do
  if d and d.changed then set_reserved(instance, d.reserved, d.requests) end
end
if num_bound > 0 then
  count('bound', num_bound)
  for class, tokens in pairs(tokens_by_class) do owe(class, nil, -tokens) end
  took(all_tokens, now)
end
spill_due(16)
feed_queue()
if unclaimed() == 0 then nobody_waits() end
return result
